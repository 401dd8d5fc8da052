"""LLaVA conversations: the first answer is the caption."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vlmcap.config import LlavaConfig
from vlmcap.data.formats import Record, read_records
from vlmcap.errors import UserError
from vlmcap.types import Skipped


def talk(id: Any, *turns: tuple[str, Any], **media: Any) -> dict[str, Any]:
    turns = turns or (
        ("human", "<image>\n무엇이 보입니까?"),
        ("gpt", "배 한 척이\n지나간다."),
        ("human", "색은?"),
        ("gpt", "흰색이다."),
    )
    return {
        "id": id,
        **(media or {"image": "a.jpg"}),
        "conversations": [{"from": who, "value": value} for who, value in turns],
    }


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("a.jpg", "b.jpg"):
        Image.new("RGB", (6, 4)).save(tmp_path / name)
    (tmp_path / "v.mp4").write_bytes(b"x")
    return tmp_path


def read(root: Path, *talks: Any, **changes: Any) -> list[Record | Skipped]:
    (root / "train.json").write_text(json.dumps(talks, ensure_ascii=False), encoding="utf-8")
    return list(read_records(LlavaConfig(root=str(root), **{"annotations": "*.json*", **changes})))


def test_the_first_answer_is_the_caption(root: Path) -> None:
    (record,) = read(root, talk("000123", category="바다", image="a.jpg"), category_key="category")
    assert isinstance(record, Record)
    assert record.clip.captions == ("배 한 척이 지나간다.",)
    assert (record.clip.id, record.clip.video, record.clip.category) == ("000123", str(root / "a.jpg"), "바다")
    assert (record.split, record.group) == ("", "")


def test_videos_frames_and_tags(root: Path) -> None:
    entries = read(
        root,
        talk(1, ("human", "<video>\n설명하세요."), ("gpt", "<video> 해가 뜬다."), video="v.mp4"),
        talk(2, image=["a.jpg", "b.jpg"]),
        talk(3, ("user", "?"), ("assistant", "비가 온다."), image=["b.jpg"]),
    )
    first, second, third = (item.clip for item in entries if isinstance(item, Record))
    assert (first.captions, first.video, first.frames) == (("해가 뜬다.",), str(root / "v.mp4"), ())
    assert second.frames == (second.video, str(root / "b.jpg")) == (str(root / "a.jpg"), str(root / "b.jpg"))
    assert (third.captions, third.video, third.frames) == (("비가 온다.",), str(root / "b.jpg"), ())


def test_ids_that_come_again_get_a_number(root: Path) -> None:
    nameless = talk(None)
    del nameless["id"]
    assert [item.clip.id for item in read(root, talk("7"), talk("7"), nameless, nameless, talk("7"))] == [
        "7",
        "7#2",
        "a",
        "a#2",
        "7#3",
    ]


def test_json_lines_are_read_as_well(root: Path) -> None:
    (root / "talks.jsonl").write_text("\n".join([json.dumps(talk("1")), "{", json.dumps(talk("2"))]), encoding="utf-8")
    entries = list(read_records(LlavaConfig(root=str(root), annotations="*.jsonl")))
    assert [type(item).__name__ for item in entries] == ["Record", "Skipped", "Record"]


def test_bad_conversations_are_named(root: Path) -> None:
    bad = [
        talk("text only", image=None),
        talk("no answer", ("human", "?")),
        talk("empty answer", ("human", "?"), ("gpt", "<image>\n")),
        talk("number", ("gpt", 3)),
        {"id": "no turns", "image": "a.jpg"},
        {"id": "strange turns", "image": "a.jpg", "conversations": ["gpt", None]},
        talk("missing", image="c.jpg"),
        talk("outside", image="/etc/passwd"),
        talk("address", image="https://example.org/a.jpg"),
        talk("frames", image=["a.jpg", 3]),
        5,
    ]
    entries = read(root, *bad, talk("good"))
    assert [item.clip.id for item in entries if isinstance(item, Record)] == ["good"]
    reasons = {item.clip.id: item.reason for item in entries if isinstance(item, Skipped)}
    assert len(reasons) == len(bad)
    assert (
        "neither an image nor a video" in reasons["text only"] and "neither an image nor a video" in reasons["frames"]
    )
    for name in ("no answer", "empty answer", "number", "no turns", "strange turns"):
        assert "no turn with text from 'gpt'" in reasons[name], name
    assert "there is no file" in reasons["missing"]
    assert "absolute path" in reasons["outside"]
    assert "allow_outside" in reasons["address"]


def test_another_layout_is_described(root: Path) -> None:
    with pytest.raises(UserError, match="none of the 1 entries"):
        read(root, {"instruction": "x", "output": "y"})
    (root / "train.json").write_text('{"train": []}')
    with pytest.raises(UserError, match="the keys train instead of a list"):
        list(read_records(LlavaConfig(root=str(root), annotations="train.json")))
