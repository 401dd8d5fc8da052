"""AI Hub data is read deterministically in any layout of folders and archives, and each fault names its clip."""

from __future__ import annotations

import json
import re
import unicodedata
import zipfile
from pathlib import Path
from typing import Any

import pytest

from vlmcap.config import AihubConfig
from vlmcap.data.formats import Record, read_records
from vlmcap.data.media import open_media
from vlmcap.data.text import normalize_caption
from vlmcap.errors import UserError
from vlmcap.types import Clip, Skipped


def label_of(name: str) -> dict[str, Any]:
    return {"annotation": {"description_kr": f"{name} 영상이다."}}


def add_clip(root: Path, name: str, label: Any = None, *, split: str = "train", video: bool = True) -> None:
    label_file, video_file = root / split / "labels" / f"{name}.json", root / split / "videos" / f"{name}.mp4"
    for file in (label_file, video_file):
        file.parent.mkdir(parents=True, exist_ok=True)
    label = label_of(name) if label is None else label
    label_file.write_bytes(label if isinstance(label, bytes) else json.dumps(label, ensure_ascii=False).encode())
    if video:
        video_file.write_bytes(b"x")


def add_files(root: Path, *names: str) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(label_of(path.stem)) if name.endswith(".json") else "x", encoding="utf-8")


def add_zip(path: Path, *names: str, encoding: str = "utf-8") -> None:
    """A zip as tools of Korean Windows (cp949) and of macOS (utf-8) write it: without the flag that says so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for number, name in enumerate(names):
            content = json.dumps(label_of(Path(name).stem)) if name.endswith(".json") else name
            archive.writestr(stand_in(number, name, encoding), content)
    raw = path.read_bytes()
    for number, name in enumerate(names):
        raw = raw.replace(stand_in(number, name, encoding).encode(), name.encode(encoding))
    path.write_bytes(raw)


def stand_in(number: int, name: str, encoding: str) -> str:
    return chr(ord("Q") + number) * len(name.encode(encoding))


def read(root: Path, split: str | None = "train", **settings: Any) -> list[Record | Skipped]:
    return list(read_records(AihubConfig(root=str(root), **settings), split))


def clips_of(root: Path, split: str | None = "train", **settings: Any) -> list[Clip]:
    entries = read(root, split, **settings)
    assert all(isinstance(entry, Record) for entry in entries), entries
    return [entry.clip for entry in entries]


def reasons_of(root: Path, split: str | None = "train", **settings: Any) -> dict[str, str]:
    return {entry.clip.id: entry.reason for entry in read(root, split, **settings) if isinstance(entry, Skipped)}


def test_clips_are_sorted_and_paired_in_sub_folders(tmp_path: Path) -> None:
    for name in ("b", "a/2", "a/1", "c"):
        add_clip(tmp_path, name)
    (tmp_path / "train" / "labels" / "._b.json").write_bytes(b"\0")  # archives made on macOS hold such files
    clips = clips_of(tmp_path)
    assert [clip.id for clip in clips] == ["a/1", "a/2", "b", "c"]
    assert clips[0].video == str(tmp_path / "train" / "videos" / "a" / "1.mp4")
    assert clips[2].captions == ("b 영상이다.",)


def test_the_split_that_is_asked_is_read(tmp_path: Path) -> None:
    for split, folder in (("train", "1.Training"), ("val", "Validation"), ("test", "test")):
        add_clip(tmp_path, f"{split}1", split=folder)
    (tmp_path / "facts.json").write_text("{}")
    for split in ("train", "val", "test"):
        assert [clip.id for clip in clips_of(tmp_path, split)] == [f"{split}1"]
    entries = read(tmp_path, None)
    assert {entry.clip.id: entry.split for entry in entries if isinstance(entry, Record)} == {
        f"{s}1": s for s in ("train", "val", "test")
    }
    assert len(entries) == 3, "facts.json is no label"


@pytest.mark.parametrize(
    "names",
    [
        ("labels/a/1.json", "videos/a/1.mp4"),
        ("a/1.json", "a/1.MP4"),
        ("02.라벨링데이터/a/1.json", "01.원천데이터/a/1.avi"),
        ("deep/labels/x/1.json", "elsewhere/1.mov"),
        ("a/1.json", "b/1.mp4", "b/1.jpg"),
        ("1.json", "photos/1.jpg"),
    ],
)
def test_labels_find_clips_anywhere(tmp_path: Path, names: tuple[str, ...]) -> None:
    add_files(tmp_path, *names)
    (entry,) = read(tmp_path)
    assert isinstance(entry, Record), entry
    assert (entry.clip.video, entry.split) == (str(tmp_path / names[1]), "")


def test_equal_stems_go_by_their_paths(tmp_path: Path) -> None:
    add_files(tmp_path, "labels/a/1.json", "labels/b/1.json", "videos/a/1.mp4", "videos/b/1.mp4")
    assert {clip.id: Path(clip.video).parent.name for clip in clips_of(tmp_path)} == {"a/1": "a", "b/1": "b"}


def test_no_label_takes_another_labels_clip(tmp_path: Path) -> None:
    add_files(tmp_path, "labels/a/1.json", "labels/b/1.json", "videos/a/1.mp4")
    assert list(reasons_of(tmp_path)) == ["b/1"]


@pytest.mark.parametrize(
    ("names", "bad", "told"),
    [
        (("x/1.json", "y/1.json", "z/1.mp4"), 2, ["x/1.json", "y/1.json", "z/1.mp4"]),
        (("x/1.json", "y/1.mp4", "z/1.mp4"), 1, ["y/1.mp4", "z/1.mp4", "x/1.json"]),
        (("1.json", "1.mp4", "1.avi"), 1, ["1.mp4", "1.avi", "1.json"]),
        (("labels/1.json", "라벨/1.json", "videos/1.mp4"), 2, ["labels/1.json", "라벨/1.json", "1.mp4"]),
    ],
)
def test_ambiguous_names_are_told(tmp_path: Path, names: tuple[str, ...], bad: int, told: list[str]) -> None:
    add_files(tmp_path, *names, "good.json", "good.mp4")
    entries = read(tmp_path)
    faults = [entry.reason for entry in entries if isinstance(entry, Skipped)]
    assert len(faults) == bad
    assert all(part in faults[0] for part in told), faults
    assert len(entries) == bad + 1


@pytest.mark.parametrize("encoding", ["cp949", "utf-8"])
def test_archives_are_read_in_place(tmp_path: Path, encoding: str) -> None:
    add_zip(tmp_path / "1.Training" / "[라벨]도심.zip", "바다.json", "산.json", encoding=encoding)
    add_zip(tmp_path / "1.Training" / "[원천]도심.zip", "산.mp4", "바다.mp4", encoding=encoding)
    add_zip(tmp_path / "2.Validation" / "VL_숲.zip", "1.json", encoding=encoding)
    add_zip(tmp_path / "2.Validation" / "VS_숲.zip", "1.mp4", encoding=encoding)
    clips = clips_of(tmp_path)
    assert [(clip.id, clip.captions) for clip in clips] == [
        ("도심/바다", ("바다 영상이다.",)),
        ("도심/산", ("산 영상이다.",)),
    ]
    with open_media(clips[0].video) as file:
        assert file.read().decode() == "바다.mp4"
    assert [clip.id for clip in clips_of(tmp_path, "val")] == ["숲/1"]
    assert {path.suffix for path in tmp_path.rglob("*") if path.is_file()} == {".zip"}, "nothing was unpacked"


def test_equal_stems_of_two_archives_go_by_the_names_of_the_archives(tmp_path: Path) -> None:
    for place in ("도심", "바다"):
        add_zip(tmp_path / f"TL_{place}.zip", "1.json")
        add_zip(tmp_path / f"TS_{place}.zip", "1.mp4")
    assert {clip.id: clip.video for clip in clips_of(tmp_path)} == {
        f"{place}/1": f"zip://1.mp4::{tmp_path}/TS_{place}.zip" for place in ("도심", "바다")
    }


def test_the_root_may_be_an_archive(tmp_path: Path) -> None:
    add_zip(tmp_path / "set.zip", "train/labels/a.json", "train/videos/a.mp4", "val/labels/b.json", "val/videos/b.mp4")
    assert [(clip.id, clip.video) for clip in clips_of(tmp_path / "set.zip")] == [
        ("a", f"zip://train/videos/a.mp4::{tmp_path}/set.zip")
    ]


def test_a_broken_archive_is_named_and_the_rest_read(tmp_path: Path) -> None:
    add_clip(tmp_path, "a")
    (tmp_path / "val").mkdir()
    (tmp_path / "train" / "more.zip").write_bytes(b"PK\3\4 cut off")
    (tmp_path / "val" / "other.zip").write_bytes(b"")
    assert list(reasons_of(tmp_path)) == ["train/more"]
    assert len(reasons_of(tmp_path, None)) == 2


def test_korean_becomes_nfc_on_one_line(tmp_path: Path) -> None:
    caption = unicodedata.normalize("NFD", " 바다가\u2028 보인다.\r\n 배가\t있다.\x0b")
    add_clip(tmp_path, "x", {"annotation": {"description_kr": caption}})
    assert clips_of(tmp_path)[0].captions == ("바다가 보인다. 배가 있다.",)
    assert normalize_caption("\u2029 ") == ""


def test_decomposed_file_names_find_their_videos(tmp_path: Path) -> None:
    add_clip(tmp_path, "바다", video=False)
    (tmp_path / "train" / "videos" / (unicodedata.normalize("NFD", "바다") + ".MP4")).write_bytes(b"x")
    assert [clip.id for clip in clips_of(tmp_path)] == ["바다"]


@pytest.mark.parametrize(
    ("label", "key", "captions"),
    [
        ({"caption": ["하나", " ", "둘"]}, "caption", ("하나", "둘")),
        ({"a": [{"b": "셋"}]}, "a.0.b", ("셋",)),
        (b"\xef\xbb\xbf" + json.dumps({"a": "넷"}).encode(), "a", ("넷",)),
    ],
)
def test_captions_at_other_keys(tmp_path: Path, label: Any, key: str, captions: tuple[str, ...]) -> None:
    add_clip(tmp_path, "x", label)
    assert clips_of(tmp_path, caption_key=key)[0].captions == captions


def test_categories_come_from_their_key(tmp_path: Path) -> None:
    add_clip(tmp_path, "a", label_of("a") | {"info": {"place": "바다"}})
    add_clip(tmp_path, "b", label_of("b") | {"info": {"place": 3}})
    add_clip(tmp_path, "c")
    assert [clip.category for clip in clips_of(tmp_path, category_key="info.place")] == ["바다", "3", ""]


@pytest.mark.parametrize(
    "label",
    [{}, [], 3, {"annotation": {"description_kr": " "}}, {"annotation": "x"}, {"annotation": {"description_kr": 3}}],
)
def test_labels_without_caption_are_named_and_the_others_read(tmp_path: Path, label: Any) -> None:
    add_clip(tmp_path, "a")
    add_clip(tmp_path, "b", label)
    good, bad = read(tmp_path)
    assert isinstance(good, Record)
    assert isinstance(bad, Skipped)
    assert (bad.clip.id, bad.clip.video) == ("b", str(tmp_path / "train" / "videos" / "b.mp4"))
    assert "b.json has no caption at data.caption_key=annotation.description_kr" in bad.reason


def test_the_keys_that_are_there_are_named(tmp_path: Path) -> None:
    add_clip(tmp_path, "x", {"annotation": {"description_en": "sea", "tags": ["sea", "sky"], "n": 3}, "title": "t"})
    assert "text at annotation.description_en, annotation.tags, title" in reasons_of(tmp_path)["x"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "x.json is not JSON"),
        (b"{", "x.json is not JSON"),
        (b"[" * 100_000, "x.json is not JSON"),
        ('{"a": "바다"}'.encode("cp949"), "x.json is not UTF-8 text .*cp949"),
        ('{"a": "바다"}'.encode("utf-16"), "x.json is not UTF-8 text .*UTF-16"),
    ],
)
def test_labels_that_are_no_json(tmp_path: Path, content: bytes, reason: str) -> None:
    add_clip(tmp_path, "x", content)
    add_clip(tmp_path, "y")
    faults = reasons_of(tmp_path)
    assert list(faults) == ["x"]
    assert re.search(reason, faults["x"]), faults


def test_a_missing_video_is_named(tmp_path: Path) -> None:
    add_clip(tmp_path, "a")
    add_clip(tmp_path, "b", video=False)
    assert "there is no clip for the label" in reasons_of(tmp_path)["b"]


def test_missing_folders(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.root=.*nowhere is neither a folder"):
        read(tmp_path / "nowhere")
    add_files(tmp_path, "a.mp4")
    with pytest.raises(UserError, match=r"contains 1 clips but no labels \(\.json\)"):
        read(tmp_path)


@pytest.mark.parametrize("kind", ["videos/a.mp4", "labels/b.json", "videos/sub", "videos"])
def test_links_out_of_the_root_are_refused(tmp_path: Path, kind: str) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    add_clip(root, "a")
    outside.mkdir()
    (outside / "secret").write_text("{}")
    link = root / "train" / kind
    if kind == "videos":
        link.rename(root / "train" / "old")
    link.unlink(missing_ok=True)
    link.symlink_to(outside / "secret" if "." in kind else outside)
    with pytest.raises(UserError, match=r"link out of data\.root.*data\.allow_outside=true"):
        read(root)
    assert read(root, allow_outside=True)


def test_links_inside_the_root_are_followed_and_circles_are_not(tmp_path: Path) -> None:
    add_clip(tmp_path, "sub/a")
    add_clip(tmp_path, "b", video=False)
    videos = tmp_path / "train" / "videos"
    (videos / "b.mp4").symlink_to(videos / "sub" / "a.mp4")
    (videos / "sub" / "up").symlink_to(videos)
    link = tmp_path.parent / f"{tmp_path.name}-link"
    link.symlink_to(tmp_path)
    assert [clip.id for clip in clips_of(link)] == ["b", "sub/a"]
