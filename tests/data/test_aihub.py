"""The AI Hub layout is read deterministically, in one form of Korean, and its faults are told in one sentence."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest

from vlmcap.data.aihub import load_aihub
from vlmcap.data.text import normalize_caption
from vlmcap.errors import UserError


def add_clip(root: Path, name: str, label: Any = None, *, split: str = "train", video: bool = True) -> None:
    label_file, video_file = root / split / "labels" / f"{name}.json", root / split / "videos" / f"{name}.mp4"
    for file in (label_file, video_file):
        file.parent.mkdir(parents=True, exist_ok=True)
    if label is None:
        label = {"annotation": {"description_kr": f"{name} 영상이다."}}
    label_file.write_bytes(label if isinstance(label, bytes) else json.dumps(label, ensure_ascii=False).encode())
    if video:
        video_file.write_bytes(b"x")


def test_clips_are_sorted_and_paired_in_sub_folders(tmp_path: Path) -> None:
    for name in ("b", "a/2", "a/1", "c"):
        add_clip(tmp_path, name)
    (tmp_path / "train" / "labels" / "._b.json").write_bytes(b"\0")  # archives made on macOS hold such files
    clips = load_aihub(tmp_path, "train")
    assert [clip.id for clip in clips] == ["a/1", "a/2", "b", "c"]
    assert clips[0].video == tmp_path / "train" / "videos" / "a" / "1.mp4"
    assert clips[2].captions == ("b 영상이다.",)


def test_korean_becomes_nfc_on_one_line(tmp_path: Path) -> None:
    caption = unicodedata.normalize("NFD", " 바다가\u2028 보인다.\r\n 배가\t있다.\x0b")
    add_clip(tmp_path, "x", {"annotation": {"description_kr": caption}})
    assert load_aihub(tmp_path, "train")[0].captions == ("바다가 보인다. 배가 있다.",)
    assert normalize_caption("\u2029 ") == ""


def test_decomposed_file_names_find_their_videos(tmp_path: Path) -> None:
    add_clip(tmp_path, "바다", video=False)
    (tmp_path / "train" / "videos" / (unicodedata.normalize("NFD", "바다") + ".MP4")).write_bytes(b"x")
    assert [clip.id for clip in load_aihub(tmp_path, "train")] == ["바다"]


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
    assert load_aihub(tmp_path, "train", key)[0].captions == captions


@pytest.mark.parametrize(
    "label", [{}, [], {"annotation": {"description_kr": " "}}, {"annotation": "x"}, {"annotation": {"description_kr": 3}}]
)
def test_labels_without_caption_are_counted(tmp_path: Path, label: Any) -> None:
    add_clip(tmp_path, "a")
    add_clip(tmp_path, "b", label)
    add_clip(tmp_path, "c", label)
    message = r"2 of 3 labels have no caption at data\.caption_key=annotation\.description_kr, first: .*b\.json"
    with pytest.raises(UserError, match=message):
        load_aihub(tmp_path, "train")


def test_the_keys_that_are_there_are_named(tmp_path: Path) -> None:
    add_clip(tmp_path, "x", {"annotation": {"description_en": "sea", "tags": ["sea", "sky"], "n": 3}, "title": "t"})
    with pytest.raises(UserError, match=r"text at annotation\.description_en, annotation\.tags, title"):
        load_aihub(tmp_path, "train")


@pytest.mark.parametrize("content", [b"", b"{", "바다".encode("cp949")])
def test_labels_that_are_no_json(tmp_path: Path, content: bytes) -> None:
    add_clip(tmp_path, "x", content)
    with pytest.raises(UserError, match=r"1 of 1 labels are no UTF-8 JSON, first: .*x\.json"):
        load_aihub(tmp_path, "train")


def test_missing_videos_are_counted(tmp_path: Path) -> None:
    add_clip(tmp_path, "a")
    add_clip(tmp_path, "b", video=False)
    with pytest.raises(UserError, match=r"1 of 2 labels have no video, first: .*b\.mp4"):
        load_aihub(tmp_path, "train")


def test_missing_folders(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.root"):
        load_aihub(tmp_path / "nowhere", "train")
    with pytest.raises(UserError, match=r"no split 'train'.*none"):
        load_aihub(tmp_path, "train")
    add_clip(tmp_path, "a", split="val")
    add_clip(tmp_path, "a", split="test")
    for split in ("train", "..", "val/../val", ""):
        with pytest.raises(UserError, match=r"no split '.*'.*\(test, val\)"):
            load_aihub(tmp_path, split)


def test_an_empty_split(tmp_path: Path) -> None:
    for name in ("labels", "videos"):
        (tmp_path / "train" / name).mkdir(parents=True)
    with pytest.raises(UserError, match="no labels"):
        load_aihub(tmp_path, "train")


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
    with pytest.raises(UserError, match=r"link out of data\.root"):
        load_aihub(root, "train")


def test_links_inside_the_root_are_followed_and_circles_are_not(tmp_path: Path) -> None:
    add_clip(tmp_path, "sub/a")
    add_clip(tmp_path, "b", video=False)
    videos = tmp_path / "train" / "videos"
    (videos / "b.mp4").symlink_to(videos / "sub" / "a.mp4")
    (videos / "sub" / "up").symlink_to(videos)
    link = tmp_path.parent / f"{tmp_path.name}-link"
    link.symlink_to(tmp_path)
    assert [clip.id for clip in load_aihub(link, "train")] == ["b", "sub/a"]
