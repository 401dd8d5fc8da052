"""What does not do is refused in one sentence, before the run folder exists."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from vlmcap.compose import compose
from vlmcap.errors import UserError
from vlmcap.training.run import train

Change = Callable[[Path], None]


def refused(overrides: list[str]) -> str:
    with pytest.raises(UserError) as caught:
        train(compose(overrides))
    sentence = str(caught.value)
    assert "\n" not in sentence
    return sentence


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("llm.max_new_tokens=600", ["8 visual tokens", "context of 512", "data.num_frames", "llm.max_new_tokens"]),
        ("llm.max_caption_tokens=500", ["context of 512", "projector.reducer=pool", "llm.max_caption_tokens"]),
        ("projector.frame_stack=3", ["projector.frame_stack=3", "data.num_frames=2"]),
        ("encoder.feature_layer=5", ["encoder.feature_layer", "-3…2"]),
        ("encoder.image_mean=[0.5]", ["encoder.image_mean", "three numbers"]),
        ("encoder.image_size=10", ["encoder.image_size=10", "14"]),
        ("projector.checkpoint=missing", ["projector.checkpoint"]),
        ("+projector.temporal=attention", []),
        ("data.root=missing", ["data.root=missing is neither a folder nor"]),
        ("data.caption_key=annotation.caption", ["data.caption_key=annotation.caption", "annotation.description_kr"]),
        ("llm.checkpoint=Qwen/Qwen3-8B", ["'Qwen/Qwen3-8B'", "set llm.checkpoint to a local folder"]),
        ("tuning.lora.target_modules=query", ["tuning.lora.target_modules=query"]),
        ("tuning.encoder_lr=0 tuning.encoder=lora", ["tuning.encoder=lora", "tuning.encoder_lr is 0"]),
        ("monitor=val/cidre", ["monitor=val/cidre", "cider"]),
        ("mode=up", ["mode must be auto, min or max, not up"]),
        ("cache.max_gib=-1", ["cache.max_gib"]),
        ("data.max_clips=0", ["data.max_clips"]),
        ("data.num_workers=-1", ["data.num_workers"]),
        ("data.decode_timeout_s=0", ["data.decode_timeout_s"]),
        ("data.decode_memory_gib=0", ["data.decode_memory_gib"]),
        ("data.splits.group_pattern=x", ["data.splits.group_pattern", "data.splits.random=true"]),
        ("data.media=clips", ["'media' is not a key of this data", "jsonl"]),
        ("data.max_tokens_per_batch=100", ["data.max_tokens_per_batch", "by_length"]),
        ("data.batching=packed", ["data.batching=packed", "data.max_tokens_per_batch"]),
        ("monitor=val/siglip/cosine", ["monitor=val/siglip/cosine is not measured"]),
        ("monitor=val/content/noun_recall", ["monitor=val/content/noun_recall is not measured", "content_recall"]),
        ("checkpoint=last", ["last.ckpt", "paths.output_dir"]),
        ("hardware=l4", ["hardware=l4", "CUDA"]),
    ],
)
def test_settings_that_do_not_do(real_path: list[str], tmp_path: Path, override: str, expected: list[str]) -> None:
    if override == "+projector.temporal=attention":
        override, expected = (
            "projector.temporal=attention",
            ["projector.hidden_dim=32", "projector.num_heads (3)", "set projector.hidden_dim=33"],
        )
        real_path = [*real_path, "projector.num_heads=3", "projector.hidden_dim=32"]
    sentence = refused([*real_path, *override.split()])
    assert all(part in sentence for part in expected), sentence
    assert not (tmp_path / "run").exists()


def test_own_weights_of_a_quantised_model_cannot_be_trained(real_path: list[str], tmp_path: Path) -> None:
    sentence = refused([*real_path, "tuning=full", "llm.quantization=4bit"])
    assert "llm.quantization=4bit; set llm.quantization=none" in sentence
    assert not (tmp_path / "run").exists()


def no_captions(root: Path) -> None:
    (root / "train" / "labels" / "train3.json").write_text(json.dumps({"annotation": {"title": "바다"}}))


def no_labels(root: Path) -> None:
    for label in (root / "val" / "labels").iterdir():
        label.unlink()


def no_split(root: Path) -> None:
    shutil.rmtree(root / "val")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (no_captions, ["1 of 11 clips cannot be used", "train3.json has no caption", "text at annotation.title"]),
        (no_labels, ["no clips of the split val", "train: 6", "data.splits.random=true"]),
        (no_split, ["no clips of the split val", "train: 6", "data.splits.random=true"]),
    ],
)
def test_data_that_does_not_do(
    real_path: list[str], aihub_root: Path, tmp_path: Path, change: Change, expected: list[str]
) -> None:
    root = shutil.copytree(aihub_root, tmp_path / "data")
    change(root)
    sentence = refused([*real_path, f"data.root={root}"])
    assert all(part in sentence for part in expected), sentence
    assert {file.name for file in (tmp_path / "run").glob("*")} <= {"skipped_clips.jsonl"}, (
        "nothing but the names of what is bad"
    )


@pytest.mark.slow
def test_a_few_undecodable_videos_are_named_and_skipped_and_many_stop_the_run(
    real_path: list[str], aihub_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = shutil.copytree(aihub_root, tmp_path / "data")
    (root / "train" / "videos" / "train1.mp4").write_bytes(b"no video")
    (root / "test" / "videos" / "test0.mp4").write_bytes(b"")
    overrides = [*real_path, f"data.root={root}", "tuning=projector_only", "tuning.epochs=1"]
    train(compose([*overrides, "data.max_bad_fraction=0.2"]))
    lines = [
        json.loads(line) for line in (tmp_path / "run" / "skipped_clips.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert [line["id"] for line in lines] == ["train1", "test0"]
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["skipped_clips"] == 2
    assert "2 clips were skipped" in capsys.readouterr().out
    sentence = refused([*overrides, "data.max_bad_fraction=0.05", f"paths.output_dir={tmp_path / 'second'}"])
    assert "1 of 11 clips cannot be used" in sentence
    assert "data.max_bad_fraction=0.05" in sentence
    assert "train1.mp4" in sentence
