"""NIKL's image captions: a line an image with five captions, a file a split."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vlmcap.config import NiklConfig
from vlmcap.data.formats import Record, read_records
from vlmcap.errors import UserError
from vlmcap.types import Skipped


def line(split: str, number: int, **changes: Any) -> dict[str, Any]:
    captions = [f"{word} 배가 바다 위를 지나간다." for word in ("한", "작은", "흰", "어떤", "저")]
    return {"id": f"nikl-{split}-{number:06d}", "input": f"{split}-{number:04d}", "output": captions, **changes}


def write(root: Path, name: str, lines: list[Any]) -> None:
    texts = [item if isinstance(item, str) else json.dumps(item, ensure_ascii=False) for item in lines]
    (root / name).write_text("\n".join(texts) + "\n", encoding="utf-8")
    for item in lines:
        if isinstance(item, dict) and isinstance(item.get("input"), str):
            file = item["input"] if "." in item["input"] else f"{item['input']}.jpg"
            Image.new("RGB", (6, 4)).save(root / file)


def read(root: Path, split: str | None = None, **changes: Any) -> list[Record | Skipped]:
    settings = {"annotations": "*{split}*.jsonl", "caption_key": "output", "media_pattern": "{id}.jpg", **changes}
    return list(read_records(NiklConfig(root=str(root), **settings), split))


def test_a_line_is_an_image_with_five_captions_in_the_split_of_its_file(tmp_path: Path) -> None:
    write(tmp_path, "nikl-2023-train.jsonl", [line("train", 0), line("train", 1)])
    write(tmp_path, "nikl-2023-dev.jsonl", [line("dev", 0)])
    records = [item for item in read(tmp_path) if isinstance(item, Record)]
    assert [(r.clip.id, r.split) for r in records] == [
        ("nikl-train-000000", "train"),
        ("nikl-train-000001", "train"),
        ("nikl-dev-000000", "val"),
    ]
    assert records[0].clip.video == str(tmp_path / "train-0000.jpg")
    assert len(records[0].clip.captions) == 5
    assert [item.clip.id for item in read(tmp_path, "val")] == ["nikl-dev-000000"]


def test_a_split_without_a_file_says_what_is_there(tmp_path: Path) -> None:
    write(tmp_path, "nikl-train.jsonl", [line("train", 0)])
    with pytest.raises(UserError, match=r"nikl-train\.jsonl"):
        read(tmp_path, "test")


def test_an_input_with_an_ending_is_the_file(tmp_path: Path) -> None:
    write(tmp_path, "train.jsonl", [line("train", 0, input="사진  하나.png")])
    (record,) = read(tmp_path)
    assert record.clip.video == str(tmp_path / "사진  하나.png")


def test_bad_lines_are_named_by_their_number(tmp_path: Path) -> None:
    separator = line("train", 1, output=["한 줄\u2028두 줄"])  # separates lines for splitlines, and must not here
    write(
        tmp_path,
        "train.jsonl",
        ["{broken", "", line("train", 0, output=[]), separator, line("train", 2, input=None), "[]"],
    )
    entries = read(tmp_path)
    assert [item.clip.captions for item in entries if isinstance(item, Record)] == [("한 줄 두 줄",)]
    reasons = {item.clip.id: item.reason for item in entries if isinstance(item, Skipped)}
    assert list(reasons) == ["line 1", "nikl-train-000000", "nikl-train-000002", "line 6"]
    assert "train.jsonl is not JSON" in reasons["line 1"]
    assert "no input" in reasons["line 6"]


def test_unlabelled_test_lines_are_one_mistake(tmp_path: Path) -> None:
    write(
        tmp_path,
        "test.jsonl",
        [{key: value for key, value in line("test", n).items() if key != "output"} for n in range(2)],
    )
    with pytest.raises(UserError, match=r"none of the 2 entries.*but text at id, input"):
        read(tmp_path, "test")


def test_a_split_is_a_word_of_a_name_and_not_a_part_of_one(tmp_path: Path) -> None:
    write(tmp_path, "latest_train.jsonl", [line("train", 0)])
    write(tmp_path, "constrained_val.jsonl", [line("val", 0)])
    expected = {"nikl-train-000000": "train", "nikl-val-000000": "val"}
    assert {item.clip.id: item.split for item in read(tmp_path) if isinstance(item, Record)} == expected
    assert [item.clip.id for item in read(tmp_path, "val")] == ["nikl-val-000000"]
    with pytest.raises(UserError, match=r"no file .* that names the split test"):
        read(tmp_path, "test")
    write(tmp_path, "train_and_val.jsonl", [line("train", 1)])
    with pytest.raises(UserError, match=r"train_and_val\.jsonl could belong to train or to val; rename it"):
        read(tmp_path)
