"""COCO with Korean captions: an image with all its captions, in the split of its folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vlmcap.config import CocoKoConfig
from vlmcap.data.formats import Record, read_records
from vlmcap.data.media import open_media
from vlmcap.errors import UserError
from vlmcap.types import Skipped

NAME = "MSCOCO_train_val_Korean.json"


def entry(number: int, split: str = "train", **changes: Any) -> dict[str, Any]:
    captions = [f"{number}번 사진이다.", "배 한 척이  지나간다.\n"]
    path = f"{split}2014/COCO_{split}2014_{number:012d}.jpg"
    return {"file_path": path, "captions": ["A boat."], "caption_ko": captions, "id": number, **changes}


def write(root: Path, entries: Any) -> None:
    (root / NAME).write_text(json.dumps(entries, ensure_ascii=False), encoding="utf-8")
    for item in entries if isinstance(entries, list) else []:
        if isinstance(item, dict) and isinstance(item.get("file_path"), str) and ".." not in item["file_path"]:
            path = root / item["file_path"]
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 6), (item.get("id", 0) % 256, 0, 0)).save(path)


def read(root: Path, **changes: Any) -> list[Record | Skipped]:
    settings = {"annotations": NAME, "caption_key": "caption_ko", **changes}
    return list(read_records(CocoKoConfig(root=str(root), **settings)))


def test_an_image_has_all_its_captions_and_the_split_of_its_folder(tmp_path: Path) -> None:
    write(tmp_path, [entry(9), entry(25, "val")])
    records = [record for record in read(tmp_path) if isinstance(record, Record)]
    assert [(record.clip.id, record.split, record.group) for record in records] == [
        ("9", "train", ""),
        ("25", "val", ""),
    ]
    assert records[0].clip.captions == ("9번 사진이다.", "배 한 척이 지나간다.")
    assert records[0].clip.frames == ()
    assert Image.open(open_media(records[1].clip.video)).getpixel((0, 0))[0] in range(20, 31)


def test_an_image_without_an_id_is_named_by_its_file(tmp_path: Path) -> None:
    plain = entry(3)
    del plain["id"]
    write(tmp_path, [plain, entry(4, file_path="사진/바다 하나.jpg")])
    first, second = read(tmp_path)
    assert first.clip.id == "train2014/COCO_train2014_000000000003"
    assert isinstance(first, Record) and isinstance(second, Record)
    assert (first.split, second.split) == ("train", "")


def test_images_lie_in_a_folder_of_their_own(tmp_path: Path) -> None:
    write(tmp_path, [entry(1)])
    (tmp_path / "images").mkdir()
    (tmp_path / "train2014").rename(tmp_path / "images" / "train2014")
    (record,) = read(tmp_path, media="images")
    assert record.clip.video == str(tmp_path / "images" / "train2014" / "COCO_train2014_000000000001.jpg")


def test_each_bad_entry_is_named_and_the_rest_is_kept(tmp_path: Path) -> None:
    bad: list[Any] = [
        entry(1, caption_ko=[]),
        entry(2, caption_ko=[1, None]),
        entry(3, caption_ko={"ko": "x"}),
        entry(4, file_path="../outside.jpg"),
        {"id": 5, "caption_ko": ["바다."]},
        "text",
        None,
    ]
    write(tmp_path, [*bad, entry(6), entry(7)])
    (tmp_path / entry(7)["file_path"]).unlink()
    entries = read(tmp_path)
    assert [item.clip.id for item in entries if isinstance(item, Record)] == ["6"]
    reasons = {item.clip.id: item.reason for item in entries if isinstance(item, Skipped)}
    assert list(reasons) == ["1", "2", "3", "4", "5", "entry 5", "entry 6", "7"]
    assert "no caption at data.caption_key=caption_ko" in reasons["1"] and "captions" in reasons["1"]
    assert ".." in reasons["4"] and "allow_outside" in reasons["4"]
    assert reasons["5"] == reasons["entry 5"] == "the entry has no file_path"
    assert "there is no file" in reasons["7"]


def test_a_wrong_key_is_one_mistake_and_not_one_an_entry(tmp_path: Path) -> None:
    write(tmp_path, [entry(number) for number in range(3)])
    with pytest.raises(
        UserError, match=r"none of the 3 entries .* data\.caption_key=caption_kr, but text at .*caption_ko"
    ):
        read(tmp_path, caption_key="caption_kr")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (
            {"images": [], "annotations": []},
            "an object with the keys images, annotations instead of a list of entries",
        ),
        ("text", "a str instead of a list"),
        ([], "has no entries"),
        ({}, "an empty object"),
    ],
)
def test_another_layout_is_described(tmp_path: Path, content: Any, reason: str) -> None:
    write(tmp_path, content)
    with pytest.raises(UserError, match=reason):
        read(tmp_path)


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b'[{"file_path": ', "is not JSON"),
        (json.dumps([entry(1)], ensure_ascii=False).encode("cp949"), "not UTF-8 text"),
        (b"[" * 100_000, "is not JSON"),
        (b"", "is not JSON"),
    ],
)
def test_a_broken_file_is_told_in_a_sentence(tmp_path: Path, raw: bytes, reason: str) -> None:
    (tmp_path / NAME).write_bytes(raw)
    with pytest.raises(UserError, match=reason):
        read(tmp_path)


def test_a_missing_file_says_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "MSCOCO_Korean_new.json").write_text("[]")
    with pytest.raises(UserError, match=r"MSCOCO_Korean_new\.json"):
        read(tmp_path)
