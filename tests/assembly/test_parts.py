"""Every part of the tables trains, scores and captions in a whole run.

Clips of several sizes share batches and a cache.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

import vlmcap
from tests.assembling import assembled
from tests.thinned import thinned
from vlmcap.assembly.clips import load_splits
from vlmcap.assembly.data import build_data
from vlmcap.compose import compose
from vlmcap.config import Config, Split
from vlmcap.errors import UserError
from vlmcap.training.run import train

SHORT = ("trainer.max_steps=2", "tuning.align_epochs=0", "tuning.epochs=1", "evaluation.max_clips=4")
PROJECTORS = [
    ["projector=linear", "projector.reducer=resample", "projector.resample_size=3"],
    ["projector=mlp", "projector.reducer=merge"],
    ["projector=mlp", "projector.reducer=saliency", "projector.use_layer_norm=true"],
    ["projector=mlp", "projector.depth=4", "projector.temporal=attention"],
    ["projector=mlp", "projector.temporal=local_global", "projector.window=4"],
    ["projector=cross_attention", "projector.num_queries=4"],
    ["projector=cross_attention", "projector.queries=prompt"],
    ["projector=perceiver", "projector.num_queries=6"],
    ["projector=c_abstractor", "projector.num_queries=9"],
    ["projector=pixel_shuffle"],
]


@pytest.mark.parametrize(
    "overrides", thinned(PROJECTORS, lambda projector: projector in PROJECTORS[3::4]), ids=" ".join
)
def test_every_projector_learns_from_the_demo(
    overrides: list[str], tiny_config: Callable[..., Config], tmp_path: Path
) -> None:
    reducer = [] if any("reducer" in override for override in overrides) else ["projector.reducer=none"]
    config = tiny_config(tmp_path, *SHORT, "projector.pool_size=2", *reducer, *overrides)
    assert math.isfinite(train(config))
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["parameters"]["projector"]["trained"] == summary["parameters"]["projector"]["parameters"] > 0
    root = yaml.safe_load((tmp_path / "config.yaml").read_text(encoding="utf-8"))["data"]["root"]
    video = min((Path(root) / "test" / "videos").glob("*.mp4"))
    row = json.loads((tmp_path / "predictions" / "test.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert row["video"] == str(video)
    assert vlmcap.load(tmp_path / "checkpoints" / "best.ckpt").caption([video]) == [row["prediction"]]


@pytest.fixture(scope="module")
def shapes_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips in landscape, portrait and square, in the AI Hub layout."""
    from vlmcap.data.decoding.video import write_video

    root = tmp_path_factory.mktemp("shapes")
    rng = np.random.default_rng(3)
    for split, count in (("train", 6), ("val", 3), ("test", 3)):
        for part in ("videos", "labels"):
            (root / split / part).mkdir(parents=True)
        for index in range(count):
            height, width = [(36, 64), (64, 36), (48, 48)][index % 3]
            frames = rng.integers(0, 255, (4, height, width, 3)).astype(np.uint8)
            write_video(root / split / "videos" / f"{split}{index}.mp4", frames, fps=4)
            label = {"annotation": {"description_kr": f"{index}번째 영상에 바다가 보인다."}}
            (root / split / "labels" / f"{split}{index}.json").write_text(
                json.dumps(label, ensure_ascii=False), encoding="utf-8"
            )
    return root


@pytest.mark.slow
@pytest.mark.parametrize(
    "projector",
    thinned(
        [
            ["projector=mlp"],
            ["projector=perceiver"],
            ["projector=mlp", "projector.reducer=pool"],
            ["projector=mlp", "projector.reducer=pool", "cache.pooled=true"],
        ],
        lambda projector: "cache.pooled=true" in projector,
    ),
)
@pytest.mark.parametrize("kind", thinned(["siglip2_naflex", "tiling"], lambda kind: kind == "siglip2_naflex"))
def test_clips_of_several_sizes_train_and_caption_alike_with_and_without_the_cache(
    kind: str,
    projector: list[str],
    checkpoints: dict[str, Any],
    naflex: Any,
    llm_folder: Path,
    shapes_root: Path,
    tmp_path: Path,
) -> None:
    encoder = ["encoder=siglip2_naflex", f"encoder.checkpoint={naflex.folder}", "encoder.max_patches=24"]
    if kind == "tiling":
        encoder = [
            "encoder=clip",
            f"encoder.checkpoint={checkpoints['clip'].folder}",
            "encoder.tiling=3",
            "projector.temporal=none",
        ]

    def config_of(name: str) -> Config:
        return compose(
            [
                *encoder,
                *(one for one in projector if name == "cached" or one != "cache.pooled=true"),
                "llm=qwen3_8b",
                "hardware=cpu",
                "data=aihub",
                f"data.root={shapes_root}",
                f"llm.checkpoint={llm_folder}",
                "hardware.frame_stack=1",
                "data.num_frames=2",
                "data.batch_size=3",
                "data.eval_batch_size=3",
                "data.num_workers=0",
                "tuning.align_epochs=0",
                "tuning.epochs=1",
                "llm.max_caption_tokens=64",
                "llm.max_new_tokens=4",
                "trainer.log_every_n_steps=1",
                *(["cache.enabled=true", "cache.dtype=float32"] if name == "cached" else ["cache.enabled=false"]),
                f"paths.output_dir={tmp_path / name}",
                f"paths.cache_dir={tmp_path / 'cache'}",
            ]
        )

    losses = []
    for name in ("cached", "decoded"):
        folder = tmp_path / name
        train(config_of(name))
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        losses.append([line["train/loss"] for line in lines if "train/loss" in line])
        rows = [
            json.loads(line)
            for line in (folder / "predictions" / "test.jsonl").read_text(encoding="utf-8").splitlines()
        ]
        captioner = vlmcap.load(folder / "checkpoints" / "best.ckpt")
        one_by_one = [captioner.caption([row["video"]])[0] for row in rows]
        assert one_by_one == [row["prediction"] for row in rows]  # padding of a batch changes nothing
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    features = assembled(config_of("cached"), load_splits(config_of("cached"), list(Split))).features
    assert features is not None
    assert all(len({grid for grid, _ in features.layouts(clips)}) > 1 for clips in features.clips.values())


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["projector.frame_stack=2"], ["projector.frame_stack=2", "encoder.tiling=3"]),
        (["projector.temporal=attention"], ["projector.temporal=attention", "encoder.tiling=3"]),
        (["projector.temporal=position"], ["projector.temporal=position", "encoder.tiling=3"]),
        (["projector.reducer=saliency"], ["projector.reducer=saliency", "encoder.tiling=3"]),
    ],
)
def test_tiles_are_not_frames(overrides: list[str], expected: list[str], real_path: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        train(compose([*real_path, "encoder.tiling=3", *overrides]))
    assert all(part in str(caught.value) for part in expected)


def narrow_llm(llm_folder: Path, folder: Path) -> Path:
    """The same language model, half as wide."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    shutil.copytree(llm_folder, folder)
    settings = Qwen3Config.from_pretrained(llm_folder)
    settings.hidden_size = settings.hidden_size // 2
    Qwen3ForCausalLM(settings).save_pretrained(folder)
    return folder


def test_splits_may_share_ids(real_path: list[str], aihub_root: Path, tmp_path: Path) -> None:
    """`clip0` of the validation split is not `clip0` of the training split, in the cache either."""
    root = Path(shutil.copytree(aihub_root, tmp_path / "data"))
    for split in ("train", "val", "test"):
        for file in [*(root / split).glob("*/*")]:
            file.rename(file.with_name(file.name.replace(split, "clip")))
    config = compose([*real_path, f"data.root={root}", "cache.enabled=true"])
    clips = load_splits(config, list(Split))
    data = build_data(config, assembled(config, clips), clips)
    first = {split: data.make_dataset(data.clips[split][:1])[0].features for split in ("train", "val", "test")}
    for split, features in first.items():
        assert sum(torch.equal(features, other) for other in first.values()) == 1, split


def test_a_run_outlives_the_projector_it_started_from(llava_folder: Path, real_path: list[str], tmp_path: Path) -> None:
    start = Path(shutil.copytree(llava_folder, tmp_path / "start"))
    llava = ["encoder.feature_layer=-2", f"encoder.checkpoint={llava_folder}", f"projector.checkpoint={start}"]
    train(compose([*real_path, *llava, "tuning.align_epochs=0", "tuning.epochs=1", "trainer.max_steps=1"]))
    shutil.rmtree(start)
    assert vlmcap.load(tmp_path / "run" / "checkpoints" / "last.ckpt").projector is not None


def test_keep_encoder_and_projector_and_swap_the_language_model(
    llava_folder: Path, llm_folder: Path, real_path: list[str], tmp_path: Path
) -> None:
    """One command where the widths fit; where they do not, in words, or trained anew when asked."""
    llava = [
        f"encoder.checkpoint={llava_folder}",
        f"projector.checkpoint={llava_folder}",
        "encoder.feature_layer=-2",
    ]
    projector = assembled(compose([*real_path, *llava])).captioner.projector.state_dict()
    saved = load_file(llava_folder / "model.safetensors")
    for ours, theirs in (("0", "linear_1"), ("2", "linear_2")):
        name = next(name for name in saved if name.endswith(f"multi_modal_projector.{theirs}.weight"))
        assert torch.equal(projector[f"projection.layers.{ours}.weight"], saved[name])
    other = [*real_path, *llava, f"llm.checkpoint={narrow_llm(llm_folder, tmp_path / 'narrow')}"]
    with pytest.raises(
        UserError, match=r"language model of width 64, but llm has width 32; set projector\.checkpoint=null"
    ) as caught:
        assembled(compose(other))
    assert "\n" not in str(caught.value)
    assert assembled(compose([*other, "projector.checkpoint=null"])).captioner.projector.sizes.out_dim == 32
