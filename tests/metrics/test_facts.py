"""Facts in captions: what counts as stated, and what the same predictions reach on the wrong clips."""

from __future__ import annotations

import itertools
import json
import math
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmcap.errors import UserError
from vlmcap.metrics import FactLexicon, fact_accuracy, permutation_expectation, swapped_fact_accuracy

FACTS = {
    "place": {"바다": ["바다", "해변"], "마을": ["마을", "바다 마을"], "산": ["산속", "산길"]},
    "direction": {"왼쪽": ["왼쪽으로"], "오른쪽": ["오른쪽으로"]},
}
LEXICON = FactLexicon.from_dict(FACTS)


@pytest.mark.parametrize(
    ("text", "place", "direction"),
    [
        ("해변에서 개가 왼쪽으로 달린다.", "바다", "왼쪽"),
        ("바다와 해변", "바다", None),  # two phrases, one value
        ("바다에서 산길로 오른쪽으로", None, "오른쪽"),  # two values: ambiguous
        ("바다 마을", "마을", None),  # the longest phrase takes what lies inside it
        ("바다 마을의 바다", None, None),  # but not the same word elsewhere
        ("바다\u2028마을", "마을", None),
        (unicodedata.normalize("NFD", "푸른 바다를 지나"), "바다", None),
        ("왼쪽에서 오른쪽으로", None, "오른쪽"),
        ("", None, None),
    ],
)
def test_extract(text: str, place: str | None, direction: str | None) -> None:
    assert LEXICON.extract(text) == {"place": place, "direction": direction}


def test_accuracy_counts_a_clip_only_where_its_first_reference_states_the_fact() -> None:
    predictions = ["바다", "산길 왼쪽으로", "바다에서 산길로", "해변 오른쪽으로"]
    references = [["해변 왼쪽으로"], ["마을", "산길 왼쪽으로"], ["산속"], ["개가 있다"]]
    # place: right, wrong, ambiguous, not stated; direction: silent, and three clips not stated.
    assert fact_accuracy(predictions, references, LEXICON) == pytest.approx(
        {"place": 1 / 3, "direction": 0.0, "mean": 1 / 6}
    )


def test_a_fact_that_no_reference_states_is_nan_and_not_in_the_mean() -> None:
    for score in (fact_accuracy, permutation_expectation):
        scores = score(["바다", "산길"], [["바다"], ["산길"]], LEXICON)
        assert math.isnan(scores["direction"])
        assert scores["mean"] == scores["place"]
    assert all(math.isnan(value) for value in fact_accuracy(["바다"], [["개"]], LEXICON).values())


def test_a_model_that_ignores_the_video_is_at_its_expectation() -> None:
    # Nine clips of three places: the same sentence for all is right for a third of them, on its own clips as on others.
    references = [[place] for place in ["바다", "마을", "산길"] * 3]
    blind = ["바다"] * 9
    assert fact_accuracy(blind, references, LEXICON)["place"] == pytest.approx(1 / 3)
    assert permutation_expectation(blind, references, LEXICON)["place"] == pytest.approx(1 / 3)
    seeing = [refs[0] for refs in references]
    assert fact_accuracy(seeing, references, LEXICON)["place"] == 1
    # Of the eight other clips two show the same place.
    assert permutation_expectation(seeing, references, LEXICON)["place"] == pytest.approx(2 / 8)


TEXTS = st.sampled_from(["바다", "마을", "산길 왼쪽으로", "오른쪽으로", "바다 산길", "개", "해변 오른쪽으로"])
CLIPS = st.lists(st.tuples(TEXTS, TEXTS), min_size=2, max_size=9)


@settings(max_examples=60, deadline=None)
@given(CLIPS)
def test_expectation_is_the_mean_over_all_pairs_and_over_all_shifts(clips: list[tuple[str, str]]) -> None:
    predictions, references = [p for p, _ in clips], [[r] for _, r in clips]
    expected = permutation_expectation(predictions, references, LEXICON)
    shifted = swapped_fact_accuracy(predictions, references, LEXICON, shifts=len(clips) - 1)
    assert shifted == pytest.approx(expected, nan_ok=True)
    for fact in FACTS:
        said = [LEXICON.extract(text)[fact] for text in predictions]
        true = [LEXICON.extract(refs[0])[fact] for refs in references]
        hits = [said[i] == true[j] for i, j in itertools.permutations(range(len(clips)), 2) if true[j] is not None]
        assert expected[fact] == pytest.approx(sum(hits) / len(hits) if hits else math.nan, nan_ok=True)


def test_shifts_are_spread_and_never_leave_a_clip_its_own_prediction() -> None:
    # Each place once: any shift but 0 makes every answer wrong.
    places = {f"곳{index:02}": [f"곳{index:02}"] for index in range(12)}
    lexicon = FactLexicon.from_dict({"place": places})
    texts = list(places)
    references = [[text] for text in texts]
    assert fact_accuracy(texts, references, lexicon)["place"] == 1
    for shifts in (1, 2, 5, 11, 50):
        assert swapped_fact_accuracy(texts, references, lexicon, shifts)["place"] == 0
    # Predictions that fit the clip k places on: k is among the shifts taken exactly when the accuracy is not 0.
    taken = {
        k
        for k in range(12)
        if swapped_fact_accuracy(texts[-k:] + texts[:-k], references, lexicon, shifts=3)["place"] > 0
    }
    assert taken == {2, 6, 10}


def test_one_clip_alone_has_no_other_clip() -> None:
    for scores in (
        permutation_expectation(["바다"], [["바다"]], LEXICON),
        swapped_fact_accuracy(["바다"], [["바다"]], LEXICON, shifts=3),
    ):
        assert all(math.isnan(value) for value in scores.values())


def test_lexicon_comes_from_a_json_file(tmp_path: Path) -> None:
    path = tmp_path / "facts.json"
    path.write_text(json.dumps(FACTS, ensure_ascii=False), encoding="utf-8")
    assert FactLexicon.from_json(path) == LEXICON
    path.write_text(unicodedata.normalize("NFD", json.dumps(FACTS, ensure_ascii=False)), encoding="utf-8")
    assert fact_accuracy(["해변"], [["바다"]], FactLexicon.from_json(path))["place"] == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "must be a non-empty object"),
        ("{}", "must be a non-empty object"),
        ("{", "Cannot read the fact lexicon"),
        ('{"mean": {"a": ["a"]}}', 'the fact "mean"'),
        ('{"place": ["바다"]}', "fact 'place' of"),
        ('{"place": {"바다": "바다"}}', "list of phrases"),
        ('{"place": {"바다": []}}', "list of phrases"),
        ('{"place": {"바다": [" "]}}', "empty or not text"),
        ('{"place": {"바다": [3]}}', "empty or not text"),
        ('{"place": {"바다": ["물"], "강": ["물"]}}', "both '바다' and '강'"),
    ],
)
def test_a_bad_lexicon_is_told_in_one_sentence(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "facts.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=message) as caught:
        FactLexicon.from_json(path)
    assert "facts.json" in str(caught.value)
    with pytest.raises(UserError, match="Cannot read"):
        FactLexicon.from_json(tmp_path / "none.json")


def test_mistakes_in_captions_are_told() -> None:
    with pytest.raises(UserError, match="shifts must be at least 1"):
        swapped_fact_accuracy(["바다"], [["바다"]], LEXICON, shifts=0)
    for call in (fact_accuracy, permutation_expectation):
        with pytest.raises(UserError, match="no captions"):
            call([], [], LEXICON)
        with pytest.raises(UserError, match="single text"):
            call(["바다"], ["바다"], LEXICON)
