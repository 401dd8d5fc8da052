"""One video in several splits is found by its content, and nothing else is."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import pytest

from vlmcap.data.features import content_hash as content
from vlmcap.data.overlap import describe_overlap
from vlmcap.types import Clip


def make(folder: Path, **contents: bytes) -> dict[str, Clip]:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in contents.items():
        (folder / f"{name}.mp4").write_bytes(data)
    return {name: Clip(name, f"{folder}/{name}.mp4", ("글",)) for name in contents}


def test_splits_without_common_videos_are_fine_and_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train = make(tmp_path / "train", a=b"1", b=b"1", c=b"333")
    val = make(tmp_path / "val", d=b"22", gone=b"1")
    (tmp_path / "val" / "gone.mp4").unlink()
    monkeypatch.setattr(content, "media_hash", None)
    assert describe_overlap({"train": list(train.values()), "val": list(val.values())}, tmp_path / "memo") is None


def test_equal_sizes_are_not_equal_contents(tmp_path: Path) -> None:
    train, val = make(tmp_path / "train", a=b"12"), make(tmp_path / "val", b=b"21")
    assert describe_overlap({"train": [train["a"]], "val": [val["b"]]}, tmp_path / "memo") is None


@pytest.mark.parametrize("how", ["copies", "links", "hard links", "one path", "members", "frames"])
def test_one_file_in_three_splits_is_named(tmp_path: Path, how: str) -> None:
    train = make(tmp_path / "train", a=b"same", b=b"other", c=b"third")
    other = make(tmp_path / "val", x=b"1234", y=b"same", z=b"other") | make(tmp_path / "test", t=b"same", u=b"5")
    video, y, t = (Path(clip.video) for clip in (train["a"], other["y"], other["t"]))
    clips = {
        "train": list(train.values()),
        "val": [other[name] for name in "xyz"],
        "test": [other[name] for name in "tu"],
    }
    if how in ("links", "hard links"):
        for path in (y, t):
            path.unlink()
            path.symlink_to(video) if how == "links" else os.link(video, path)
    elif how == "one path":
        clips["val"][1] = Clip("y", str(video), ("글",))
    elif how == "members":
        with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("y.mp4", b"same")
        clips["val"][1] = Clip("y", f"zip://y.mp4::{tmp_path}/a.zip", ("글",))
    elif how == "frames":
        for split, position, name in (("train", 0, "a"), ("val", 1, "y"), ("test", 0, "t")):
            clips[split][position] = Clip(name, str(video), ("글",), frames=(str(video), train["b"].video))
    sentence = describe_overlap(clips, tmp_path / "memo")
    assert sentence is not None and "\n" not in sentence
    assert sentence.startswith(
        "the same videos are in train and val (2), train and test (1), val and test (1), so scores will be too high"
    )
    assert f"the first is train/a ({video}) = val/y (" in sentence


def test_remote_videos_are_compared_by_address(tmp_path: Path) -> None:
    def clip(name: str, video: str) -> Clip:
        return Clip(name, video, ("글",))

    train = [clip("a", "s3://bucket/a.mp4"), clip("b", "s3://bucket/b.mp4")]
    assert describe_overlap({"train": train, "val": [clip("c", "s3://bucket/c.mp4")]}, tmp_path / "memo") is None
    sentence = describe_overlap({"train": train, "val": [clip("c", "s3://bucket/b.mp4")]}, tmp_path / "memo")
    assert sentence is not None and "train and val (1)" in sentence and "the first is train/b (" in sentence
