"""Many texts at once, full-width forms, and the Java tokenizer itself where there is Java."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest

from tests.metrics.test_tokenizers import PTB
from vlmcap.errors import UserError
from vlmcap.metrics import tokenizers
from vlmcap.metrics.tokenizers import TOKENIZER_NAMES, Tokenizer, get_tokenizer, normalize

TEXTS = [
    "바닷가에서 사람이 왼쪽으로 달립니다.",
    "",
    "KBS 뉴스\u2028화면\r위에 “자막”이 3.5초 보입니다.",
    unicodedata.normalize("NFD", "눈 덮인 숲길을 지나갑니다"),
    "바닷가에서 사람이 왼쪽으로 달립니다.",
    "A man's dog isn't here \ud83d 한글\x00",
]


@pytest.mark.parametrize("workers", [None, 1, 2, 9])
@pytest.mark.parametrize("name", TOKENIZER_NAMES)
def test_many_texts_get_the_tokens_of_each(name: str, workers: int | None) -> None:
    if (workers == 9 and name != "mecab_ko") or (workers == 2 and name == "kiwi"):
        pytest.skip("once is enough, and kiwi's worker takes ten seconds to start")
    tokenizer = get_tokenizer(name)
    assert tokenizer.tokenize_many(TEXTS, workers) == [tokenizer(text) for text in TEXTS]
    assert tokenizer.tokenize_many([], workers) == []


def test_workers_normalize_fullwidth_as_their_tokenizer_does() -> None:
    texts = ["３ｋｍ 앞", "ＫＢＳ！"]
    tokenizer = get_tokenizer("mecab_ko", normalize_fullwidth=True)
    assert (
        tokenizer.tokenize_many(texts, 2)
        == [tokenizer(text) for text in texts]
        == [get_tokenizer("mecab_ko")(t) for t in ("3km 앞", "KBS!")]
    )


def test_a_tokenizer_of_ones_own_stays_in_this_process() -> None:
    seen: list[str] = []

    def split(text: str) -> list[str]:
        seen.append(text)
        return text.split("-")

    # Under a known name as well: the workers would split otherwise.
    assert Tokenizer("whitespace", "mine", split).tokenize_many(["가-나", "다", "가-나"], 2) == [
        ["가", "나"],
        ["다"],
        ["가", "나"],
    ]
    assert seen == ["가-나", "다"]


def test_workers_are_started_for_many_characters_only(monkeypatch: pytest.MonkeyPatch) -> None:
    assert tokenizers.worker_count([]) == tokenizers.worker_count(TEXTS) == 1
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(64), raising=False)
    assert tokenizers.worker_count(["가" * 1000] * 3500) == 3
    assert tokenizers.worker_count(["가" * 1000] * 99_999) == 8


def test_a_number_of_workers_below_1_and_a_worker_that_stops_are_told() -> None:
    with pytest.raises(UserError, match="workers must be at least 1, not 0"):
        get_tokenizer("char").tokenize_many(TEXTS, 0)
    with pytest.raises(RuntimeError, match="Unknown tokenizer 'none'"):
        tokenizers.tokenize_in_processes("none", False, TEXTS, 2)


def test_workers_do_not_run_the_callers_script_again(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "print('ran')\n"
        "from vlmcap.metrics.tokenizers import get_tokenizer\n"
        "print(get_tokenizer('mecab_ko').tokenize_many(['바다에서', '산에서'], 2))\n",
        encoding="utf-8",
    )
    environment = {"PYTHONPATH": ":".join(path for path in sys.path if path), "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, encoding="utf-8", check=True, timeout=120, env=environment
    )
    assert done.stdout.splitlines() == ["ran", "[['바다', '에서'], ['산', '에서']]"]


def test_full_width_forms_are_folded_on_request_only() -> None:
    text = "３ｋｍ　（ＢＢＣ）！～"
    assert normalize(text) == "３ｋｍ （ＢＢＣ）！～"
    assert normalize(text, normalize_fullwidth=True) == "3km (BBC)!~"
    plain, folded = get_tokenizer("ptb"), get_tokenizer("ptb", normalize_fullwidth=True)
    assert folded.version == f"{plain.version}, full-width normalized"
    assert folded(text) == plain("3km (BBC)!~") != plain(text)
    assert not plain.normalize_fullwidth


@pytest.mark.skipif(shutil.which("java") is None, reason="compares with Stanford's tokenizer, which needs Java")
def test_ptb_equals_the_jar_run_here(tmp_path: Path) -> None:
    module = pytest.importorskip("pycocoevalcap.tokenizer.ptbtokenizer")
    jar = Path(module.__file__).parent / module.STANFORD_CORENLP_3_4_1_JAR
    symbols = [
        chr(code)
        for first, last in ((0xA1, 0xC0), (0x2010, 0x2600), (0x3001, 0x3040), (0x3200, 0x3400))
        for code in range(first, last)
    ]
    texts = [*PTB, *(f"가 {symbol} 나" for symbol in symbols if normalize(symbol) == symbol)]
    (tmp_path / "texts").write_text("\n".join(texts) + "\n", encoding="utf-8")
    command = [
        "java",
        "-Dfile.encoding=UTF-8",
        "-cp",
        str(jar),
        "edu.stanford.nlp.process.PTBTokenizer",
        "-preserveLines",
        "-lowerCase",
        "texts",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, encoding="utf-8", check=True, timeout=120)
    lines = [
        [word for word in line.split(" ") if word and word not in module.PUNCTUATIONS]
        for line in done.stdout.split("\n")
    ]
    split = get_tokenizer("ptb")
    assert [split(text) for text in texts] == lines[: len(texts)]
