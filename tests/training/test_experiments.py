"""Every named combination and every whole model trains, scores, captions, and goes on from its checkpoint.

Real classes, tiny weights.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import vlmcap
from tests.thinned import thinned
from vlmcap.compose import compose, from_plain, to_config
from vlmcap.training.checkpoints.load import read_checkpoint
from vlmcap.training.run import evaluate, train

EXPERIMENTS = [
    "recommended_t4",
    "recommended_l4",
    "recommended_a100",
    "recommended_h100",
    "quality_h100",
    "efficient_t4",
]
# Model, its kind, and whether the features come from the cache; those of LLaVA are CLIP's, those of Qwen3-VL several
# layers at once.
WHOLE = [
    ("llava_next_video_7b", "llava_next_video", True),
    ("qwen2_vl_7b", "qwen2_vl", False),
    ("qwen2_5_vl_7b", "qwen2_5_vl", False),
    ("qwen3_vl_8b", "qwen3_vl", True),
    ("custom", "qwen2_5_vl", False),
]
Run = Callable[..., Path]


@pytest.fixture
def run(aihub_root: Path, tmp_path: Path) -> Run:
    """Returns a function that trains two CPU steps of a combination at tiny size and returns the folder."""

    def make(*overrides: str) -> Path:
        folder = tmp_path / "run"
        settings = [
            *overrides,
            "data=aihub",
            f"data.root={aihub_root}",
            "hardware.accelerator=cpu",
            "hardware.num_workers=0",
            "hardware.image_size=null",
            "data.num_frames=4",
            "llm.max_caption_tokens=96",
            "llm.max_new_tokens=6",
            "evaluation.max_clips=2",
            "trainer.accumulate_grad_batches=1",
            "tuning.align_epochs=1",
            "tuning.epochs=2",
            "data.batch_size=4",
            "data.eval_batch_size=2",
            f"paths.output_dir={folder}",
            f"paths.cache_dir={tmp_path / 'cache'}",
        ]
        train(compose(settings))
        return folder

    return make


def check(folder: Path, videos: Path, run: Run, *overrides: str) -> None:
    """The folder is complete, its checkpoint captions and scores as the run did, and resuming has nothing to do."""
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["steps"] == 4
    assert summary["parameters"]["projector"]["trained"] > 0
    assert summary["parameters"]["adapters"]["trained"] > 0
    assert summary["parameters"]["encoder"]["trained"] == summary["parameters"]["llm"]["trained"] == 0
    checkpoint = folder / "checkpoints" / "best.ckpt"
    names = read_checkpoint(checkpoint)["state_dict"].keys()
    assert all(name.startswith("captioner.projector.") or "lora_" in name for name in names)
    rows = [
        json.loads(line) for line in (folder / "predictions" / "test.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    captions = vlmcap.load(checkpoint).caption(sorted(videos.glob("*.mp4")))
    assert captions == [row["prediction"] for row in rows]
    saved = read_checkpoint(checkpoint)["vlmcap"]["config"]
    scores = evaluate(
        to_config(from_plain(saved, {"paths.output_dir": str(folder / "evaluation"), "data.split": "test"})), checkpoint
    )
    assert scores["test/rouge_l"] == pytest.approx(summary["scores"]["test/rouge_l"])
    run(*overrides, "checkpoint=last")
    assert json.loads((folder / "summary.json").read_text())["steps"] == 4


@pytest.mark.parametrize("name", thinned(EXPERIMENTS, lambda name: name == "recommended_l4"))
def test_every_experiment_runs(
    name: str, run: Run, checkpoints: dict[str, Any], llm_folder: Path, llava_folder: Path, aihub_root: Path
) -> None:
    config = compose([f"experiment={name}", "data.root=data"])
    overrides = [f"model.checkpoint={llava_folder}", "hardware.precision=bf16"]  # the T4's float16 is not for a CPU
    if config.model.name == "assembled":
        name_of_encoder = config.encoder.name.removeprefix("tiny_")
        encoder = checkpoints[
            next((family for family in checkpoints if name_of_encoder.startswith(family)), "clip")
        ].folder
        overrides = [f"encoder.checkpoint={encoder}", f"llm.checkpoint={llm_folder}", "hardware.precision=bf16"]
    overrides = [f"experiment={name}", *overrides]
    check(run(*overrides), aihub_root / "test" / "videos", run, *overrides)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind", "is_cached"), WHOLE)
def test_every_whole_model_runs(
    name: str, kind: str, is_cached: bool, run: Run, llava_folder: Path, qwen_folders: dict[str, Path], aihub_root: Path
) -> None:
    folder = ({"llava_next_video": llava_folder} | qwen_folders)[kind]
    patches = [] if kind == "llava_next_video" else ["encoder.max_patches=64"]
    overrides = [f"model={name}", "hardware=l4", f"model.checkpoint={folder}", f"cache.enabled={is_cached}", *patches]
    check(run(*overrides), aihub_root / "test" / "videos", run, *overrides)
