"""Shards are read in place: from disk and from an object store, with the same clips."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import fsspec
import pytest

from vlmcap.config import WebdatasetConfig
from vlmcap.data import media
from vlmcap.data.decoding.video import decode_frames, write_video
from vlmcap.data.formats import Record, read_records
from vlmcap.data.formats.webdataset import expand_braces
from vlmcap.data.media import open_media
from vlmcap.errors import UserError
from vlmcap.types import Skipped

pytestmark = pytest.mark.usefixtures("fresh_store")


def write_shard(path: Path, members: dict[str, bytes | str | dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, value in members.items():
            text = json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else value
            content = text.encode() if isinstance(text, str) else text
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def upload(root: Path) -> str:
    for path in root.rglob("*.tar"):
        fsspec.filesystem("memory").pipe(f"/bucket/set/{path.relative_to(root)}", path.read_bytes())
    return "memory://bucket/set"


def read(
    root: Path | str, annotations: str = "*.tar", split: str | None = None, **changes: Any
) -> list[Record | Skipped]:
    settings = WebdatasetConfig(root=str(root), annotations=annotations, **{"caption_key": "caption", **changes})
    return list(read_records(settings, split))


def samples(first: int, count: int) -> dict[str, Any]:
    members: dict[str, Any] = {}
    for number in range(first, first + count):
        members[f"{number:06d}.mp4"] = f"video {number}"
        members[f"{number:06d}.json"] = {"caption": f"{number}번 영상이다.", "kind": "바다" if number % 2 else "산"}
    return members


def test_the_same_clips_from_disk_and_from_a_store(tmp_path: Path) -> None:
    for shard in range(3):
        write_shard(tmp_path / f"clips-{shard:03d}.tar", samples(shard * 4, 4))
    local, remote = read(tmp_path, category_key="kind"), read(upload(tmp_path), category_key="kind")
    assert len(local) == 12
    for number, (a, b) in enumerate(zip(local, remote, strict=True)):
        assert isinstance(a, Record) and isinstance(b, Record)
        assert a.clip.id == b.clip.id == f"clips-{number // 4:03d}/{number:06d}"
        assert a.clip.captions == b.clip.captions == (f"{number}번 영상이다.",)
        assert a.clip.category == b.clip.category == ("바다" if number % 2 else "산")
        assert open_media(a.clip.video).read() == open_media(b.clip.video).read() == f"video {number}".encode()
    assert local[0].clip.video == f"tar://000000.mp4::{tmp_path}/clips-000.tar"
    assert remote[0].clip.video == "tar://000000.mp4::memory://bucket/set/clips-000.tar"


def test_a_real_video_decodes_out_of_a_remote_shard(tmp_path: Path, make_frames: Any) -> None:
    write_video(tmp_path / "a.mp4", make_frames(6), fps=6)
    write_shard(tmp_path / "a.tar", {"x.txt": " 바다 위로\n해가 뜬다.", "x.mp4": (tmp_path / "a.mp4").read_bytes()})
    (record,) = read(upload(tmp_path))
    assert isinstance(record, Record)
    assert record.clip.captions == ("바다 위로 해가 뜬다.",)
    assert decode_frames(record.clip.video, 3).equal(decode_frames(str(tmp_path / "a.mp4"), 3))


def test_splits_are_folders_or_parts_of_names(tmp_path: Path) -> None:
    write_shard(tmp_path / "train" / "000.tar", samples(0, 2))
    write_shard(tmp_path / "valid" / "000.tar", samples(2, 1))
    root = upload(tmp_path)
    for place in (tmp_path, root):
        assert [(item.clip.id, getattr(item, "split", None)) for item in read(place, "{split}/*.tar")] == [
            ("train/000/000000", "train"),
            ("train/000/000001", "train"),
            ("valid/000/000002", "val"),
        ]
        assert [item.clip.id for item in read(place, "{split}/*.tar", "val")] == ["valid/000/000002"]
        assert len(read(place, "{train,valid}/{000..000}.tar")) == 3
        with pytest.raises(UserError, match=r"is not a file below data\.root"):
            read(place, "{split}/*.tar", "test")


def test_braces() -> None:
    assert expand_braces("a-{008..011}.tar") == ["a-008.tar", "a-009.tar", "a-010.tar", "a-011.tar"]
    assert expand_braces("{a,b}/{split}-{0..1}.tar") == [
        "a/{split}-0.tar",
        "a/{split}-1.tar",
        "b/{split}-0.tar",
        "b/{split}-1.tar",
    ]
    assert expand_braces("*.tar") == ["*.tar"]
    for pattern, reason in (
        ("{9..1}", "count up"),
        ("{0..99999999}", "count up"),
        ("{a}", "neither"),
        ("{000..999}{000..999}", "more than"),
    ):
        with pytest.raises(UserError, match=reason):
            expand_braces(pattern)


def test_a_shard_that_is_spelled_out_must_be_there(tmp_path: Path) -> None:
    write_shard(tmp_path / "clips-0.tar", samples(0, 1))
    for place in (tmp_path, upload(tmp_path)):
        with pytest.raises(UserError, match=r"clips-1\.tar is not a file"):
            read(place, "clips-{0..1}.tar")


def test_a_shard_named_twice_counts_once(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.tar", samples(0, 2))
    assert len(read(tmp_path, "{a,*}.tar")) == 2


def test_members_of_a_sample_may_lie_apart_and_in_folders(tmp_path: Path) -> None:
    members = {
        "./영상/a.v1.MP4": b"1",
        "./영상/a.v2.mp4": b"2",
        "b.jpg": b"thumbnail",
        "b.webm": b"3",
        "._b.webm": b"of macOS",
        "README.md": b"about",
        "b.txt": "비가 온다.",
        "./영상/a.v2.json": {"caption": ["둘", "둘째"]},
        "./영상/a.v1.json": {"caption": "하나"},
    }
    write_shard(tmp_path / "s.tar", members)
    clips = {item.clip.id: item.clip for item in read(tmp_path) if isinstance(item, Record)}
    assert {id: clip.captions for id, clip in clips.items()} == {
        "s/영상/a.v1": ("하나",),
        "s/영상/a.v2": ("둘", "둘째"),
        "s/b": ("비가 온다.",),
    }
    assert [open_media(clip.video).read() for clip in clips.values()] == [b"1", b"2", b"3"]


def test_json_is_asked_before_text(tmp_path: Path) -> None:
    both = {
        "a.png": b"x",
        "a.json": {"caption": "제이슨"},
        "a.txt": "글",
        "b.png": b"x",
        "b.json": {"other": "x"},
        "b.txt": "글",
    }
    write_shard(tmp_path / "s.tar", both)
    assert [item.clip.captions for item in read(tmp_path)] == [("제이슨",), ("글",)]


def test_bad_samples_are_named(tmp_path: Path) -> None:
    bad = {
        "alone.json": {"caption": "x"},
        "broken.mp4": b"x",
        "broken.json": "{",
        "korean.mp4": b"x",
        "korean.txt": "바다 위로 해가".encode("cp949"),
        "bare.mp4": b"x",
        "wrong.mp4": b"x",
        "wrong.json": {"caption": 3, "text": "여기"},
        "deep.mp4": b"x",
        "deep.json": b"[" * 100_000,
    }
    write_shard(tmp_path / "s.tar", bad | samples(0, 1))
    for place in (tmp_path, upload(tmp_path)):
        entries = read(place)
        assert [item.clip.id for item in entries if isinstance(item, Record)] == ["s/000000"]
        reasons = {item.clip.id: item.reason for item in entries if isinstance(item, Skipped)}
        assert list(reasons) == ["s/alone", "s/broken", "s/korean", "s/bare", "s/wrong", "s/deep"]
        assert "no video or image, only json" in reasons["s/alone"]
        assert "is not JSON" in reasons["s/broken"] and "is not JSON" in reasons["s/deep"]
        assert "not UTF-8" in reasons["s/korean"]
        assert "it has mp4" in reasons["s/bare"]
        assert "text at text" in reasons["s/wrong"]


def test_a_broken_or_compressed_shard_stops_in_words(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.tar", samples(0, 1))
    (tmp_path / "b.tar").write_bytes((tmp_path / "a.tar").read_bytes()[:700])
    with pytest.raises(UserError, match=r"b\.tar is not a complete tar archive.*or leave it out of data\.annotations"):
        read(tmp_path)
    with tarfile.open(tmp_path / "c.tar.gz", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("a.mp4"))
    with pytest.raises(UserError, match="tar -cf"):
        read(tmp_path, "*.tar.gz")


def test_a_wrong_key_is_one_mistake(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.tar", samples(0, 3))
    with pytest.raises(UserError, match=r"none of the 3 entries.*data\.caption_key=text.*but text at caption, kind"):
        read(tmp_path, caption_key="text")


def test_shards_stay_below_the_root(tmp_path: Path) -> None:
    write_shard(tmp_path / "outside.tar", samples(0, 1))
    (tmp_path / "root").mkdir()
    for pattern in ("../outside.tar", f"{tmp_path}/outside.tar", "memory://bucket/outside.tar"):
        with pytest.raises(UserError, match=r"data\.annotations"):
            read(tmp_path / "root", pattern)


def test_reading_asks_for_no_video(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shard(
        tmp_path / "a.tar",
        {"a.mp4": b"v" * 3_000_000, "a.json": {"caption": "하나"}, "b.mp4": b"v" * 3_000_000, "b.txt": "둘"},
    )
    root, asked = upload(tmp_path), []
    original = media.read_range

    def counting(place: str, start: int, end: int) -> bytes:
        asked.append(end - start)
        return original(place, start, end)

    monkeypatch.setattr(media, "read_range", counting)
    assert len(read(root)) == 2
    assert sum(asked) < 100
