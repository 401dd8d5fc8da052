"""From true Hugging Face folders to a trained, scored and speaking captioner.

`encoder=siglip2 llm=qwen3_8b`, 4 bits, on the CPU.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import vlmcap
from vlmcap.cli import main
from vlmcap.compose import compose, from_plain, to_config
from vlmcap.config import KOREAN_PROMPT, Config
from vlmcap.errors import UserError
from vlmcap.training.checkpoints.load import load_captioner, read_checkpoint
from vlmcap.training.run import evaluate, train


@dataclass(frozen=True)
class Trained:
    """A finished run."""

    config: Config
    folder: Path
    objective: float

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoints" / "best.ckpt"


@pytest.fixture(scope="module")
def trained(
    siglip_folder: Path, llm_folder: Path, aihub_root: Path, tmp_path_factory: pytest.TempPathFactory
) -> Trained:
    """hardware=l4 but for the accelerator: bf16, 4 bits, gradient checkpointing, accumulation."""
    folder = tmp_path_factory.mktemp("runs")
    overrides = [
        "encoder=siglip2",
        "llm=qwen3_8b",
        "hardware=l4",
        "hardware.accelerator=cpu",
        "hardware.num_workers=0",
        "data=aihub",
        f"encoder.checkpoint={siglip_folder}",
        f"llm.checkpoint={llm_folder}",
        f"data.root={aihub_root}",
        "data.num_frames=4",
        "projector.frame_stack=2",
        "projector.reducer=none",
        "projector.temporal=none",
        "trainer.accumulate_grad_batches=4",
        "trainer.log_every_n_steps=1",
        "llm.max_caption_tokens=96",
        "llm.max_new_tokens=6",
        f"llm.prompt={KOREAN_PROMPT}",  # otherwise the data would decide it
        "tuning.projector_lr=1e-3",
        "tuning.align_epochs=1",
        "tuning.epochs=2",
        f"paths.output_dir={folder / 'run'}",
        f"paths.cache_dir={folder / 'cache'}",
    ]
    config = compose(overrides)
    return Trained(config, folder / "run", train(config))


def lines_of(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_run_is_what_it_says(trained: Trained) -> None:
    assert trained.config.llm.quantization.value == "4bit"
    assert trained.config.hardware.precision.value == "bf16-mixed"
    summary = json.loads((trained.folder / "summary.json").read_text())
    parts = summary["parameters"]
    assert parts["encoder"]["trained"] == parts["llm"]["trained"] == 0
    assert parts["projector"]["trained"] == parts["projector"]["parameters"] > 0
    assert parts["adapters"]["trained"] == parts["adapters"]["parameters"] > 0
    assert summary["steps"] == 4  # 6 clips, accumulation of 4, two epochs
    assert summary["scores"]["val/cider"] == pytest.approx(trained.objective)
    assert {"val/bleu_4", "val/meteor", "test/cider", "val/loss"} <= summary["scores"].keys()
    assert summary["peak_memory_gib"] > 0
    assert {"torch", "vlmcap", "transformers"} <= summary["versions"].keys()
    assert {"seconds", "git_revision", "tokenizer"} <= summary.keys()


def test_the_run_folder_holds_its_contract(trained: Trained) -> None:
    plain = yaml.safe_load((trained.folder / "config.yaml").read_text(encoding="utf-8"))
    assert "${" not in (trained.folder / "config.yaml").read_text()
    assert to_config(from_plain(plain)) == trained.config
    metrics = lines_of(trained.folder / "metrics.jsonl")
    assert [row["step"] for row in metrics if "train/loss" in row] == [1, 2, 3, 4]
    assert all({"step", "epoch"} <= row.keys() for row in metrics)
    assert any("val/bleu_4" in row and "val/cider" in row for row in metrics)
    assert {path.name for path in (trained.folder / "checkpoints").iterdir()} == {"last.ckpt", "best.ckpt"}
    for epoch in range(2):
        rows = lines_of(trained.folder / "predictions" / f"val-epoch={epoch:02d}.jsonl")
        assert [row["id"] for row in rows] == ["val0", "val1", "val2"]
        assert all(row.keys() == {"id", "video", "prediction", "references", "scores", "tokenizer"} for row in rows)
        assert all(Path(row["video"]).is_file() for row in rows)


def test_checkpoints_hold_trained_weights_only(trained: Trained) -> None:
    content = read_checkpoint(trained.folder / "checkpoints" / "last.ckpt")
    names = content["state_dict"].keys()
    assert any(name.startswith("captioner.projector.") for name in names)
    assert any("lora_A" in name for name in names)
    assert all(name.startswith("captioner.projector.") or "lora_" in name for name in names)
    assert content["optimizer_states"][0]["state"]
    assert content["vlmcap"]["base_checkpoints"].keys() == {"encoder", "llm"}
    assert to_config(from_plain(content["vlmcap"]["config"])) == trained.config


def test_the_base_under_a_loaded_captioner_is_the_files(trained: Trained, llm_folder: Path) -> None:
    from bitsandbytes.functional import dequantize_4bit

    captioner = load_captioner(trained.checkpoint)
    weights = dict(captioner.llm.named_parameters())
    name = next(name for name in weights if name.endswith("layers.0.mlp.down_proj.base_layer.weight"))
    restored = dequantize_4bit(weights[name].data, weights[name].quant_state)
    saved = load_file(llm_folder / "model.safetensors")["model.layers.0.mlp.down_proj.weight"]
    assert torch.cosine_similarity(restored.float().flatten(), saved.float().flatten(), dim=0) > 0.99
    for key, tensor in read_checkpoint(trained.checkpoint)["state_dict"].items():
        assert torch.equal(dict(captioner.named_parameters())[key.removeprefix("captioner.")], tensor)


def test_captions_of_the_loaded_checkpoint_are_the_runs(trained: Trained, aihub_root: Path) -> None:
    captioner = vlmcap.load(trained.checkpoint)
    videos = sorted((aihub_root / "test" / "videos").glob("*.mp4"))
    assert captioner.caption([]) == []
    found = captioner.caption([str(video) for video in videos])
    assert found == [row["prediction"] for row in lines_of(trained.folder / "predictions" / "test.jsonl")]
    with pytest.raises(UserError, match=r"label\.mp4 could not be read"):
        captioner.caption([videos[0].with_name("label.mp4")])


def test_evaluation_from_the_checkpoint_alone(trained: Trained, tmp_path: Path) -> None:
    saved = read_checkpoint(trained.checkpoint)["vlmcap"]["config"]
    config = to_config(from_plain(saved, {"paths.output_dir": str(tmp_path / "eval"), "evaluation.swap_videos": True}))
    scores = evaluate(config, trained.checkpoint)
    summary = json.loads((trained.folder / "summary.json").read_text())["scores"]
    assert scores["test/cider"] == pytest.approx(summary["test/cider"])
    assert "test/swapped/cider" in scores
    assert {path.name for path in (tmp_path / "eval").iterdir()} == {
        "evaluation.yaml",
        "metrics.json",
        "predictions.jsonl",
    }
    predictions = lines_of(tmp_path / "eval" / "predictions.jsonl")
    assert predictions == lines_of(trained.folder / "predictions" / "test.jsonl")
    assert json.loads((tmp_path / "eval" / "metrics.json").read_text())["checkpoint"] == str(trained.checkpoint)


def test_evaluation_into_the_runs_own_folder(trained: Trained, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(trained.folder / "predictions", folder / "predictions")
    saved = read_checkpoint(trained.checkpoint)["vlmcap"]["config"]
    evaluate(to_config(from_plain(saved, {"paths.output_dir": str(folder), "data.split": "val"})), trained.checkpoint)
    assert (folder / "predictions" / "val-epoch=00.jsonl").is_file()
    assert len(lines_of(folder / "predictions.jsonl")) == 3


def test_the_caption_command(
    trained: Trained, aihub_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "captions.jsonl"
    videos = aihub_root / "test" / "videos"
    main(
        [
            "caption",
            str(videos),
            str(videos / "test0.mp4"),
            "--checkpoint",
            str(trained.checkpoint),
            "--output",
            str(output),
        ]
    )
    rows = lines_of(output)
    assert [Path(row["video"]).name for row in rows] == ["test0.mp4", "test1.mp4", "test0.mp4"]
    assert rows[0]["prediction"] == rows[2]["prediction"]
    broken = tmp_path / "broken.mp4"
    broken.write_text("바다")
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(["caption", str(broken), str(videos / "test0.mp4"), "--checkpoint", str(trained.checkpoint)])
    out, err = capsys.readouterr()
    assert stop.value.code == 2
    assert f"{videos / 'test0.mp4'}\t" in out  # the good one is captioned all the same
    assert "Error: 1 of 2 files could not be read; the first is" in err
    assert "broken.mp4" in err


def changed_copy(folder: Path, target: Path) -> Path:
    copy = Path(shutil.copytree(folder, target))
    weights = load_file(copy / "model.safetensors")
    weights[next(iter(weights))] += 0.01
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


@pytest.mark.parametrize("part", ["encoder", "llm"])
def test_another_base_is_refused(
    trained: Trained, siglip_folder: Path, llm_folder: Path, tmp_path: Path, part: str
) -> None:
    other = changed_copy({"encoder": siglip_folder, "llm": llm_folder}[part], tmp_path / "other")
    with pytest.raises(UserError, match=rf"was trained on the {part} .*{part}\.checkpoint is"):
        load_captioner(trained.checkpoint, {f"{part}.checkpoint": str(other)})


@pytest.mark.parametrize(
    ("key", "value"),
    [("projector.depth", 3), ("projector.frame_stack", 1), ("tuning.lora.rank", 8), ("projector.temporal", "position")],
)
def test_another_architecture_is_refused(trained: Trained, key: str, value: Any) -> None:
    with pytest.raises(UserError, match="from another architecture") as caught:
        load_captioner(trained.checkpoint, {key: value})
    assert "\n" not in str(caught.value)


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        vlmcap.load(tmp_path / "missing.ckpt")
    (tmp_path / "text.ckpt").write_text("바다")
    with pytest.raises(UserError, match="is not a checkpoint that can be read safely"):
        vlmcap.load(tmp_path / "text.ckpt")
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    with pytest.raises(UserError, match=r"not written by vlmcap's train\.py"):
        vlmcap.load(tmp_path / "other.ckpt")
    torch.save({"vlmcap": Path("code")}, tmp_path / "pickled.ckpt")
    with pytest.raises(UserError, match="read safely"):
        vlmcap.load(tmp_path / "pickled.ckpt")
