"""What is a caption in a label, and what is said where there is none."""

from __future__ import annotations

import re
from typing import Any

import pytest

from vlmcap.data.formats.keys import Captions, captions_at, describe_keys, value_at, why_no_caption
from vlmcap.data.text import normalize_caption

INVISIBLE = {
    "nothing": "",
    "blanks": " \t\n",
    "no-break space": "\u00a0\u202f\u2007",
    "ideographic space": "\u3000",
    "zero width space": "\u200b\u200b",
    "joiners": "\u200d\u200c",
    "word joiner": "\u2060",
    "byte order mark": "\ufeff",
    "soft hyphen": "\u00ad",
    "Hangul fillers": "\u3164\u115f\u1160\uffa0",
    "braille blank": "\u2800",
    "Mongolian vowel separator": "\u180e",
    "variation selectors": "\ufe0f\U000e0100",
    "combining grapheme joiner": "\u034f",
    "marks of direction": "\u200e\u200f\u061c\u202a\u2066\u2069",
    "invisible operators": "\u2061\u2062\u2063\u2064",
    "tags": "\U000e0001\U000e0041",
    "line separators": "\u2028\u2029\x85",
    "controls": "\x00\x07\x7f",
    "all at once": " \ufeff\u200b\u00a0\u3164\u200d\u00ad",
}


@pytest.mark.parametrize("text", INVISIBLE.values(), ids=INVISIBLE)
def test_invisible_captions_are_empty_and_said_to_be(text: str) -> None:
    assert normalize_caption(text) == ""
    assert normalize_caption(f"{text}바{text}다{text}") != ""
    label = {"caption": text, "title": "제목", "other": [text, None]}
    assert captions_at(label, "caption").texts == ()
    assert (
        why_no_caption(label, "caption")
        == " (the text there is empty, or has only invisible characters), but text at title"
    )
    assert captions_at({"caption": [text]}, "caption") == Captions((), 1)


@pytest.mark.parametrize("text", ["가", "a", "1", ".", "🌊", "❤️", "👨‍👩‍👧", "ㅋ", "中", "→", "\ue000"])
def test_what_can_be_seen_is_a_caption(text: str) -> None:
    assert normalize_caption(text) == text


@pytest.mark.parametrize(
    ("label", "key", "found"),
    [
        ({"a.b": "점", "a": {"b": "칸"}}, "a.b", "점"),
        ({"a": {"b": "칸"}}, "a.b", "칸"),
        ({"a.b": "점"}, "a.b", "점"),
        ({"x": {"a.b": "점"}}, "x.a.b", "점"),
        ({"x.a": {"b": "점"}}, "x.a.b", "점"),
        ({"x.a": {"c": "점"}, "x": {"a.b": "칸"}}, "x.a.b", "칸"),
        ({"x.a": {"b": "점"}, "x": {"a": {"b": "칸"}}}, "x.a.b", "점"),
        ({"a.b": None, "a": {"b": "칸"}}, "a.b", None),
        ({"a.b": ["점"]}, "a.b.0", "점"),
        ([{"a.b": "점"}], "0.a.b", "점"),
        ({"0": "점"}, "0", "점"),
        ({"a": "글"}, "a.b", None),
        ({"a": ["글"]}, "a.1", None),
        ({"a": ["글"]}, "a.-1", None),
        ("글", "a", None),
        (None, "a.b", None),
    ],
)
def test_the_exact_key_comes_before_the_path(label: Any, key: str, found: Any) -> None:
    assert value_at(label, key) == found


@pytest.mark.parametrize(
    ("value", "texts", "num_empty"),
    [
        (["하나.", None, "둘."], ("하나.", "둘."), 1),
        (["", "하나.", " ", "\u200b", None], ("하나.",), 4),
        ([None, None], (), 2),
        ([], (), 0),
        ("하나.", ("하나.",), 0),
        (None, (), 0),
        (["하나.", 3], (), 0),
        ([["하나."]], (), 0),
        ({"ko": "하나."}, (), 0),
    ],
)
def test_nulls_and_empty_texts_of_a_list_are_left_out_and_counted(
    value: Any, texts: tuple[str, ...], num_empty: int
) -> None:
    assert captions_at({"caption": value}, "caption") == Captions(texts, num_empty)


@pytest.mark.parametrize(
    ("label", "sentence"),
    [
        ({"text": "글"}, ", but text at text"),
        ({"caption": None, "text": "글"}, ", but text at text"),
        ({"caption": None}, ", and no text at any key"),
        ({"caption": 3}, " (there is a number), and no text at any key"),
        ({"caption": True}, " (there is true or false), and no text at any key"),
        ({"caption": {"ko": "글"}}, " (there is an object), but text at caption.ko"),
        (
            {"caption": [], "text": "글"},
            " (there is a list without text, or with other values in it), but text at text",
        ),
        (
            {"caption": [None, " "]},
            " (the text there is empty, or has only invisible characters), and no text at any key",
        ),
    ],
)
def test_no_sentence_contradicts_itself(label: Any, sentence: str) -> None:
    assert why_no_caption(label, "caption") == sentence
    assert not re.search(r"text at caption(,|$)", describe_keys(label))
