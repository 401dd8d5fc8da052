"""Captions that look the same are the same."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlmcap.data.text import is_mainly_hangul, normalize_caption


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (unicodedata.normalize("NFD", "왼쪽에서 걷는다."), "왼쪽에서 걷는다."),
        (" 가\r\n나\u2028다\u2029라\x0b마\x85바\u3000사\x1c아 ", "가 나 다 라 마 바 사 아"),
        ("\ufeff가\x00나\x07\u200b다\u00ad\u202e라\x7f\ud83d", "가나다라"),
        ("\u1100\u200b\u1161", "가"),
        ("👨‍👩‍👧 ❤️ 🇰🇷", "👨‍👩‍👧 ❤️ 🇰🇷"),
        ("\u200b \ufeff\n", ""),
    ],
)
def test_what_is_made_of_a_caption(text: str, expected: str) -> None:
    assert normalize_caption(text) == expected


@given(st.text(st.characters(exclude_categories=())))
def test_any_text_ends_on_one_line_that_a_file_can_hold(text: str) -> None:
    caption = normalize_caption(text)
    assert normalize_caption(caption) == caption
    assert caption.encode("utf-8").decode() == caption
    assert len(caption.splitlines()) <= 1
    assert not any(unicodedata.category(char) == "Cc" for char in caption)


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["바다가 보인다."], True),
        ([unicodedata.normalize("NFD", "바다")], True),
        (["'Seoul'이라 쓰인 간판이 보인다"], True),
        (["Seoul 간판"], False),
        (["바다", "A very long English caption"], False),
        (["2024 … 🌊"], False),
        ([], False),
    ],
)
def test_the_language_of_captions(texts: list[str], expected: bool) -> None:
    assert is_mainly_hangul(texts) is expected
