"""Lines become clips, bad lines are named by file and line, and memory stays flat."""

from __future__ import annotations

import itertools
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from vlmcap.config import JsonlConfig
from vlmcap.data.formats import Record, jsonl, read_records
from vlmcap.errors import UserError
from vlmcap.types import Clip, Skipped

GOOD = {"video": "a.mp4", "caption": "바다."}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("a.mp4", "b.mp4", "sub/1.jpg", "sub/2.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    return tmp_path


def write(path: Path, *lines: Any) -> None:
    path.write_bytes(
        b"\n".join(line if isinstance(line, bytes) else json.dumps(line, ensure_ascii=False).encode() for line in lines)
    )


def read(
    root: Path, split: str | None = None, annotations: str | None = "*.jsonl", **settings: Any
) -> list[Record | Skipped]:
    settings = {"caption_key": "caption"} | settings
    return list(read_records(JsonlConfig(root=str(root), annotations=annotations, **settings), split))


def test_videos_images_and_frames(root: Path) -> None:
    write(
        root / "set.jsonl",
        GOOD | {"id": "first", "split": "train", "category": "바다", "group": "tape1"},
        {"image": "sub/1.jpg", "captions": ["산.", " ", "눈."]},
        {"frames": ["sub/1.jpg", "sub/2.jpg"], "caption": ["차."], "id": 7},
    )
    video, image, frames = read(root)
    assert video == Record(Clip("first", f"{root}/a.mp4", ("바다.",), "바다"), "train", "tape1")
    assert image == Record(Clip("sub/1.jpg:2", f"{root}/sub/1.jpg", ("산.", "눈.")), num_empty=1)
    assert frames == Record(Clip("7", f"{root}/sub/1.jpg", ("차.",), frames=(f"{root}/sub/1.jpg", f"{root}/sub/2.jpg")))


def test_blank_lines_and_byte_order_marks_are_passed_over(root: Path) -> None:
    write(
        root / "set.jsonl",
        b"\xef\xbb\xbf" + json.dumps(GOOD).encode(),
        b"",
        b"  \r",
        json.dumps(GOOD).encode() + b"\r",
        b"",
    )
    assert [entry.clip.id for entry in read(root)] == ["a.mp4:1", "a.mp4:4"]


def test_made_up_ids_differ_over_all_files(root: Path) -> None:
    for name in ("x.jsonl", "y.jsonl"):
        write(root / name, GOOD, GOOD)
    assert [entry.clip.id for entry in read(root)] == [f"a.mp4:{number}" for number in range(1, 5)]


def test_a_file_may_name_the_split_and_a_line_overrules_it(root: Path) -> None:
    write(root / "train.jsonl", GOOD, GOOD | {"split": "val"})
    write(root / "validation.jsonl", GOOD, b"{")
    write(root / "other.jsonl", GOOD)
    assert [entry.split for entry in read(root) if isinstance(entry, Record)] == ["", "train", "val", "val"]
    entries = read(root, "train")
    assert [entry.clip.id for entry in entries] == ["a.mp4:1", "a.mp4:2"], "what names no split may be of any"
    assert [entry.clip.id for entry in read(root, "val") if isinstance(entry, Record)] == [
        "a.mp4:1",
        "a.mp4:3",
        "a.mp4:4",
    ]


def test_keys_may_be_dotted(root: Path) -> None:
    write(root / "set.jsonl", {"video": "a.mp4", "text": {"ko": ["바다."]}, "tags": ["해안"]})
    (entry,) = read(root, caption_key="text.ko", category_key="tags.0")
    assert (entry.clip.captions, entry.clip.category) == (("바다.",), "해안")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{", "the line is not JSON"),
        (b"[" * 100_000, "the line is not JSON"),
        (b"3", "the line is not a JSON object"),
        ('{"caption": "바다"}'.encode("cp949"), "the line is not UTF-8 text (byte 13"),
        ({"caption": "바다."}, "none of them, but caption"),
        (GOOD | {"image": "sub/1.jpg"}, "has video and image"),
        ({"video": 3, "caption": "바다."}, "'video' must be a file name"),
        ({"video": ["a.mp4"], "caption": "바다."}, "'video' must be a file name"),
        ({"frames": [], "caption": "바다."}, "'frames' must be a list of file names"),
        ({"frames": ["sub/1.jpg", None], "caption": "바다."}, "'frames' must be a list of file names"),
        (
            {"video": "a.mp4", "text": "바다."},
            "no caption at data.caption_key=caption or captions, but text at video, text",
        ),
        ({"video": "a.mp4", "caption": 3}, "no caption at"),
        ({"video": "a.mp4", "caption": " "}, "no caption at"),
        (GOOD | {"id": {}}, "'id' is neither"),
        ({"video": "lost.mp4", "caption": "바다."}, "there is no file"),
        ({"video": "../a.mp4", "caption": "바다."}, "contains '..'"),
        ({"video": "/etc/passwd", "caption": "바다."}, "an absolute path"),
        ({"video": "s3://bucket/a.mp4", "caption": "바다."}, "is an address"),
        ({"video": "a\ud800.mp4", "caption": "바다."}, "is not a file name"),
    ],
)
def test_bad_lines_are_named(root: Path, line: Any, reason: str) -> None:
    line = json.dumps(line).encode() if isinstance(line, dict) else line
    write(root / "set.jsonl", GOOD, line, GOOD)
    first, bad, last = read(root)
    assert isinstance(first, Record)
    assert isinstance(last, Record)
    assert isinstance(bad, Skipped)
    assert bad.reason.startswith(f"{root}/set.jsonl:2: ")
    assert reason in bad.reason
    json.dumps([bad.clip.id, bad.clip.video, bad.reason], ensure_ascii=False).encode()


def test_a_line_too_long_is_passed_over(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jsonl, "MAX_LINE_BYTES", 100)
    exact = json.dumps(GOOD | {"pad": ""})
    exact = json.dumps(GOOD | {"pad": "x" * (99 - len(exact))})
    write(root / "set.jsonl", exact.encode(), b"x" * 100, b"x" * 1050, GOOD, b"y" * 300)
    entries = read(root)
    assert [isinstance(entry, Record) for entry in entries] == [True, False, False, True, False]
    assert [entry.reason.split(": ")[0][-1] for entry in entries if isinstance(entry, Skipped)] == ["2", "3", "5"]
    assert all("more than 100 bytes" in entry.reason for entry in entries if isinstance(entry, Skipped))


@pytest.mark.slow
def test_memory_is_flat(root: Path) -> None:
    line = json.dumps(GOOD | {"pad": "x" * 500}).encode() + b"\n"
    (root / "set.jsonl").write_bytes(line * 20_000)
    entries = read_records(JsonlConfig(root=str(root), annotations="set.jsonl", caption_key="caption"))
    assert sum(1 for _ in itertools.islice(entries, 1000)) == 1000
    tracemalloc.start()
    try:
        assert sum(1 for _ in entries) == 19_000
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


def test_missing_annotations_say_what_is_there(root: Path) -> None:
    write(root / "all.jsonl", GOOD)
    with pytest.raises(
        UserError,
        match=r"annotations=train\.jsonl is not a file .*; that folder contains all\.jsonl, so set data\.annotations",
    ):
        read(root, annotations="train.jsonl")
    with pytest.raises(UserError, match=r"data\.annotations has no value"):
        read(root, annotations=None)
    with pytest.raises(UserError, match=r"that folder does not exist, so set data\.root"):
        read(root / "nowhere")
