"""Content words: which they are, and how they are counted against references."""

from __future__ import annotations

import json
import math
import unicodedata
from pathlib import Path
from typing import Any

import pytest

from vlmcap.errors import UserError
from vlmcap.metrics.content import (
    CONTENT_CLASS_NAMES,
    content_counts,
    content_from_counts,
    content_scores,
    load_synonyms,
)
from vlmcap.metrics.morphemes import analyze_many

CAPTION = "푸른 바닷가에서 두 사람이 서울 KBS 로고를 보며 3번 천천히 달렸습니다."


def words(text: str) -> dict[str, str]:
    return {morpheme.form: morpheme.content_class for morpheme in analyze_many([text])[0] if morpheme.content_class}


def test_classes_of_content_words() -> None:
    assert words(CAPTION) == {
        "푸르": "adjective",
        "바닷가": "noun",
        "두": "number",
        "사람": "noun",
        "서울": "proper",
        "kbs": "foreign",
        "로고": "noun",
        "보": "verb",
        "3": "number",
        "달리": "verb",
    }
    assert set(words(CAPTION).values()) == set(CONTENT_CLASS_NAMES)


@pytest.mark.parametrize("text", ["", " \u2028", ".", "것이 있다", "하고 있었습니다", "그리고", "…!?"])
def test_text_without_content_words(text: str) -> None:
    assert words(text) == {}


def test_known_answer_by_class() -> None:
    # Captions: 개, 공원, 달리. References: 개, 개, 공원, 예쁘, 뛰.
    scores = content_scores(["개가 공원에서 달립니다."], [["개와 개가 예쁜 공원에서 뛰었다."]])
    assert scores["content_precision"] == pytest.approx(2 / 3)
    assert scores["content_recall"] == pytest.approx(2 / 5)
    assert scores["content_f1"] == pytest.approx(4 / 8)
    assert scores["content/noun_precision"] == 1
    assert scores["content/noun_recall"] == pytest.approx(2 / 3)
    assert scores["content/verb_precision"] == scores["content/verb_recall"] == scores["content/adjective_recall"] == 0
    assert all(
        math.isnan(scores[name])
        for name in ("content/adjective_precision", "content/number_recall", "content/proper_precision")
    )
    assert list(scores)[:3] == ["content_precision", "content_recall", "content_f1"]
    assert len(scores) == 3 + 2 * len(CONTENT_CLASS_NAMES)


def test_scores_are_of_the_sums_and_the_best_reference_counts() -> None:
    predictions = ["개가 달린다", "바다", ""]
    references = [["사람이 걷는다", "개가 달렸다"], ["산"], ["하늘"]]
    counts = content_counts(predictions, references)
    assert counts.shape == (3, len(CONTENT_CLASS_NAMES), 3)
    assert counts.sum(1).tolist() == [[2, 2, 2], [0, 1, 1], [0, 0, 1]]
    scores = content_scores(predictions, references)
    assert scores == pytest.approx(content_from_counts(counts.sum(0)), nan_ok=True)
    assert scores["content_precision"] == pytest.approx(2 / 3)
    assert scores["content_recall"] == pytest.approx(2 / 4)


def test_particles_endings_order_and_unicode_form_do_not_count() -> None:
    other = unicodedata.normalize("NFD", "천천히 달렸던\u2028사람은\r바닷가로")
    assert content_scores([other], [["바닷가에서 사람이 달립니다."]])["content_f1"] == 1


def test_synonyms_count_in_every_form(tmp_path: Path) -> None:
    synonyms = {"바닷가": ["해변", "해안"], "달리다": ["뛰다"], "이동하다": ["움직이다"]}
    prediction, reference = ["해변에서 뛰었습니다."], [["바닷가에서 달린다."]]
    assert content_scores(prediction, reference)["content_f1"] == 0
    assert content_scores(prediction, reference, synonyms)["content_f1"] == 1
    path = tmp_path / "synonyms.json"
    path.write_text(unicodedata.normalize("NFD", json.dumps(synonyms, ensure_ascii=False)), encoding="utf-8")
    for given in (path, str(path)):
        assert content_scores(prediction, reference, given)["content_f1"] == 1
    # Two synonyms in the caption are not right twice.
    assert content_scores(["해변과 해안"], [["바닷가"]], synonyms)["content_precision"] == pytest.approx(1 / 2)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "Cannot read the synonyms"),
        ("[]", "must be an object"),
        ('{"개": "강아지"}', "'개' needs a list"),
        ('{"개": [3]}', "'개' needs a list"),
        ('{"개": [" "]}', "none of them empty"),
        ('{"배": ["선박"], "과일": ["배"]}', "'배' counts as both '배' and '과일'"),
    ],
)
def test_bad_synonyms_end_in_one_sentence(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "synonyms.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=message) as caught:
        load_synonyms(path)
    assert "\n" not in str(caught.value)
    assert "synonyms.json" in str(caught.value)
    with pytest.raises(UserError, match="Cannot read"):
        load_synonyms(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        ([], [], "no captions"),
        (["가"], [], "1 predictions but 0"),
        ([None], [["가"]], "is None"),
        (["가"], [[]], "has no reference"),
    ],
)
def test_mistakes_in_captions_are_told(predictions: Any, references: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        content_scores(predictions, references)
