"""A training run on a damaged data set.

It goes on without the bad clips and names them, stops past the limit, and names deadly ones.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from vlmcap.compose import compose
from vlmcap.config import Config
from vlmcap.data.loading import clip_dataset as dataset
from vlmcap.data.loading import isolation
from vlmcap.errors import UserError
from vlmcap.training.run import train

REASONS = {
    "bad-label": "is not JSON",
    "cp949": "is not UTF-8 text",
    "lonely": "there is no clip for the label",
    "train0": "it is damaged, truncated or not a video",
    "train1": "the file is empty",
    "train2": "decoding took longer than data.decode_timeout_s=2 and was stopped",
}


@pytest.fixture
def damaged(aihub_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The data set with three bad labels, two bad clips and one that the decoder never returns from."""
    root = tmp_path / "clips"
    shutil.copytree(aihub_root, root)
    videos, labels = root / "train" / "videos", root / "train" / "labels"
    for name, label in (
        ("bad-label", b'{"annotation": '),
        ("cp949", '{"annotation": {"description_kr": "가"}}'.encode("cp949")),
    ):
        shutil.copy(videos / "train3.mp4", videos / f"{name}.mp4")
        (labels / f"{name}.json").write_bytes(label)
    shutil.copy(labels / "train3.json", labels / "lonely.json")
    (videos / "train0.mp4").write_text("바다 위로 해가 뜬다.\n" * 50, encoding="utf-8")
    (videos / "train1.mp4").write_bytes(b"")
    decode = dataset.read_timed_frames

    def hang(clip: Any, *args: Any, **others: Any) -> Any:
        return signal.pause() if clip.id == "train2" else decode(clip, *args, **others)

    monkeypatch.setattr(dataset, "read_timed_frames", hang)
    monkeypatch.setattr(isolation, "_GRACE_S", 0.2)
    return root


def configure(real_path: list[str], root: Path, *overrides: str) -> Config:
    return compose(
        [
            *real_path,
            f"data.root={root}",
            "data.decode_timeout_s=2",
            "data.num_workers=1",
            "tuning.align_epochs=0",
            "tuning.epochs=1",
            *overrides,
        ]
    )


def test_a_run_goes_on_without_its_bad_clips(real_path: list[str], damaged: Path, tmp_path: Path) -> None:
    train(configure(real_path, damaged, "data.max_bad_fraction=0.5"))
    lines = [
        json.loads(line) for line in (tmp_path / "run" / "skipped_clips.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert sorted(line["id"] for line in lines) == sorted(REASONS)
    for line in lines:
        assert REASONS[line["id"]] in line["reason"]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["skipped_clips"] == len(REASONS)


@pytest.mark.slow
@pytest.mark.parametrize(("fraction", "count"), [(0.1, "3"), (0.3, "[56]")])
def test_too_many_stop_it_before_or_in_training(
    real_path: list[str], damaged: Path, fraction: float, count: str
) -> None:
    """3 of 14 labels are bad before anything is decoded; the clips come on top, and a batch may hold two of them."""
    with pytest.raises(
        UserError, match=rf"^{count} of 14 clips cannot be used, more than data\.max_bad_fraction={fraction} "
    ):
        train(configure(real_path, damaged, f"data.max_bad_fraction={fraction}"))


def test_a_worker_that_dies_is_reported_with_its_clip(
    real_path: list[str], aihub_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = dataset.read_timed_frames

    def die(clip: Any, *args: Any, **others: Any) -> Any:
        if clip.id == "train4":
            os.kill(os.getpid(), signal.SIGKILL)
        return decode(clip, *args, **others)

    monkeypatch.setattr(dataset, "read_timed_frames", die)
    with pytest.raises(
        UserError,
        match=r"^a data worker, process \d+, died .*while it read train4 \(.*train4\.mp4\); remove that clip",
    ):
        train(configure(real_path, aihub_root, "data.is_isolated=false"))
