"""VATEX: one language of the captions, a file a split, and cuts of one film stay together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vlmcap.config import VatexConfig
from vlmcap.data.formats import Record, read_records
from vlmcap.errors import UserError
from vlmcap.types import Skipped


def entry(id: str, **changes: Any) -> dict[str, Any]:
    return {
        "videoID": id,
        "enCap": ["A boat."],
        "chCap": ["一条船。"],
        "koCap": ["배 한 척이 지나간다.", "배가 간다."],
        **changes,
    }


def write(root: Path, name: str, entries: list[Any]) -> None:
    (root / name).write_text(json.dumps(entries, ensure_ascii=False), encoding="utf-8")
    (root / "videos").mkdir(exist_ok=True)
    for item in entries:
        if isinstance(item, dict) and "videoID" in item:
            (root / "videos" / f"{item['videoID']}.mp4").write_bytes(b"x")


def read(root: Path, split: str | None = None, **changes: Any) -> list[Record | Skipped]:
    settings = {"annotations": "*{split}*.json", "media": "videos", "caption_key": "koCap", **changes}
    return list(read_records(VatexConfig(root=str(root), **settings), split))


def test_videos_of_the_published_files(tmp_path: Path) -> None:
    write(
        tmp_path, "vatex_training_v1.0.json", [entry("G9zN5TTuGO4_000179_000189"), entry("G9zN5TTuGO4_000200_000210")]
    )
    write(tmp_path, "vatex_validation_v1.0.json", [entry("-_b_1_000001_000011")])
    write(tmp_path, "vatex_public_test_english_v1.1.json", [entry("plain")])
    records = [item for item in read(tmp_path) if isinstance(item, Record)]
    assert [(r.split, r.group) for r in records] == [
        ("train", "G9zN5TTuGO4"),
        ("train", "G9zN5TTuGO4"),
        ("val", "-_b_1"),
        ("test", ""),
    ]
    assert records[0].clip.captions == ("배 한 척이 지나간다.", "배가 간다.")
    assert records[2].clip.video == str(tmp_path / "videos" / "-_b_1_000001_000011.mp4")
    assert [item.clip.id for item in read(tmp_path, "val", caption_key="chCap")] == ["-_b_1_000001_000011"]


def test_the_original_names_the_languages_it_has(tmp_path: Path) -> None:
    original = entry("a_000001_000011")
    del original["koCap"]
    write(tmp_path, "vatex_training_v1.0.json", [original])
    with pytest.raises(UserError, match=r"data\.caption_key=koCap, but text at videoID, enCap, chCap"):
        read(tmp_path)
    (record,) = read(tmp_path, caption_key="enCap")
    assert record.clip.captions == ("A boat.",)


def test_bad_entries_are_named(tmp_path: Path) -> None:
    write(tmp_path, "train.json", [entry("a"), {"koCap": ["x"]}, 3, entry("b", koCap=None), entry("c")])
    (tmp_path / "videos" / "c.mp4").unlink()  # many have gone from the web
    entries = read(tmp_path)
    assert [item.clip.id for item in entries if isinstance(item, Record)] == ["a"]
    assert [item.clip.id for item in entries if isinstance(item, Skipped)] == ["entry 1", "entry 2", "b", "c"]


def test_an_id_leads_to_no_file_outside(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "secret.mp4").write_bytes(b"x")
    write(tmp_path / "root", "train.json", [entry("a")])
    (tmp_path / "root" / "train.json").write_text(json.dumps([entry("../../secret"), entry(f"{tmp_path}/secret")]))
    with pytest.raises(UserError, match=r"none of the 2 entries.*contains '\.\.'"):
        read(tmp_path / "root")
