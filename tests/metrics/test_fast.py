"""Counted corpora score like the readable reference for any chunks, with bounded memory and no collisions."""

from __future__ import annotations

import math
import random
import tracemalloc
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.metrics import reference
from tests.metrics.test_parity import check_against_coco, check_against_reference
from vlmcap.errors import UserError
from vlmcap.metrics import corpus as corpus_module
from vlmcap.metrics import get_tokenizer, rouge, score_captions, score_each, scores
from vlmcap.metrics.corpus import ReferenceCorpus, clip_statistics, corpus_scores
from vlmcap.metrics.ngrams import Packed, Vocabulary, join, rank
from vlmcap.metrics.rouge import lcs_length, lcs_lengths

KOREAN = [
    f"{stem}{ending}"
    for stem in ("바다", "산", "사람", "달리", "보이", "걷")
    for ending in ("", "에서", "가", "는", "다")
]
ENGLISH = [
    "a",
    "the",
    "dog",
    "cat",
    "runs",
    "walks",
    "on",
    "in",
    "beach",
    "street",
    "slowly",
    "red",
    "blue",
    "and",
    "with",
]


def generated(words: list[str], clips: int, longest: int, seed: int) -> tuple[list[list[str]], list[list[list[str]]]]:
    """Clips of one to five references.

    Predictions near a reference, equal to it, unrelated, of one token, of none, with unknown words.
    """
    draw = random.Random(seed)

    def caption() -> list[str]:
        return [
            words[int(len(words) * draw.random() ** 2)]
            for _ in range(draw.choice([0, 1, 2, draw.randint(3, longest), longest]))
        ]

    truth = [[caption() for _ in range(draw.randint(1, 5))] for _ in range(clips)]
    truth[1] = [truth[0][0]] * 3
    said = []
    for refs in truth:
        near = [word if draw.random() < 0.8 else draw.choice(words) for word in draw.choice(refs)]
        said.append(draw.choice([near, refs[0], caption(), [*near, "새말", "새말", "새말", "새말"], [], ["바다"]]))
    return said, truth


@pytest.mark.parametrize("words", [KOREAN, ENGLISH, KOREAN[:1]])
@pytest.mark.parametrize("longest", [6, 90])
def test_generated_corpora_equal_pycocoevalcap(words: list[str], longest: int) -> None:
    check_against_coco(generated(words, 25, longest, seed=longest))


@pytest.mark.parametrize("size", [1, 7, 100, 5000])
def test_chunks_change_nothing(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    said, truth = generated(KOREAN, 40, 30, seed=3)
    whole = clip_statistics(said, ReferenceCorpus(truth))
    monkeypatch.setattr(corpus_module, "CHUNK_TOKENS", size)
    parts = check_against_reference((said, truth))
    for name in ("matches", "ngrams", "hypothesis_length", "reference_length", "cider", "cider_d", "rouge_l"):
        np.testing.assert_allclose(getattr(parts, name), getattr(whole, name), rtol=1e-12, atol=1e-15)


def test_references_without_a_token_and_short_ones() -> None:
    check_against_reference(([["바다"], [], ["산", "산"]], [[[]], [[], []], [[]]]))
    check_against_reference(
        ([["가", "나", "다", "라", "마"], ["가"]], [[["가"]], [["나"], []]])
    )  # no n-gram above order 1 in any reference


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.text("가나다라", max_size=200), st.text("가나다마", max_size=200)), min_size=1, max_size=8),
    st.booleans(),
)
def test_lcs_of_both_ways_equals_the_table(pairs: list[tuple[str, str]], side_by_side: bool) -> None:
    expected = [reference.lcs_length(a, b) for a, b in pairs]
    assert [lcs_length(a, b) for a, b in pairs] == expected
    vocabulary = Vocabulary()
    first, second = (Packed.pack([list(pair[side]) for pair in pairs], vocabulary) for side in (0, 1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rouge, "_PAIRS_PER_WORD", 0 if side_by_side else 10**9)
        numbers = np.arange(len(pairs))
        assert lcs_lengths(first, second, numbers, numbers).tolist() == expected


def test_carries_run_through_all_words() -> None:
    # Equal captions of one token: every step adds across all 64-bit words.
    lengths = [1, 63, 64, 65, 128, 129, 400]
    vocabulary = Vocabulary()
    first = Packed.pack([["가"] * n for n in lengths for _ in lengths], vocabulary)
    second = Packed.pack([["가"] * n for _ in lengths for n in lengths], vocabulary)
    numbers = np.arange(len(lengths) ** 2)
    for per_word in (0, 10**9):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(rouge, "_PAIRS_PER_WORD", per_word)
            assert lcs_lengths(first, second, numbers, numbers).tolist() == [
                min(a, b) for a in lengths for b in lengths
            ]


@pytest.mark.parametrize("largest", [10, 2**31 - 1])
def test_ranks_are_exact_however_large_the_ids(largest: int) -> None:
    # Ids too large for the place to ride along take the other way; both give what numpy's unique gives.
    generator = np.random.default_rng(0)
    prefix, token = generator.integers(0, largest, 500), generator.integers(0, largest, 500)
    prefix[::3], token[::3] = prefix[0], token[0]
    prefix[1], token[1] = largest, largest
    table, places = rank(prefix, token)
    assert table.tolist() == np.unique(join(prefix, token)).tolist()
    assert table[places].tolist() == join(prefix, token).tolist()


def test_take_keeps_document_frequencies() -> None:
    said, truth = generated(ENGLISH, 30, 20, seed=5)
    statistics = clip_statistics(said, ReferenceCorpus(truth))
    rows = [3, 3, 7, 29]
    taken = statistics.take(rows)
    assert corpus_scores(taken)["cider"] == pytest.approx(statistics.cider[rows].mean())
    bleu = reference.corpus_bleu([said[row] for row in rows], [truth[row] for row in rows])
    assert [corpus_scores(taken)[f"bleu_{order}"] for order in range(1, 5)] == pytest.approx(bleu)
    mask = np.arange(30) < 2
    assert statistics.take(mask).matches.tolist() == statistics.take([0, 1]).matches.tolist()


def test_one_clip_has_no_cider() -> None:
    statistics = clip_statistics([["바다"]], ReferenceCorpus([[["바다"]]]))
    assert math.isnan(statistics.cider[0])
    assert math.isnan(statistics.cider_d[0])
    assert corpus_scores(statistics)["rouge_l"] == 1


def test_tokens_come_back_as_they_were_given() -> None:
    _, truth = generated(KOREAN, 20, 10, seed=1)
    assert ReferenceCorpus(truth).tokens() == truth


@pytest.mark.parametrize(
    ("hypotheses", "message"), [([["가"]], "1 hypotheses for 2 clips"), ([["가"]] * 3, "more hypotheses than the 2")]
)
def test_numbers_that_differ_are_told(hypotheses: list[list[str]], message: str) -> None:
    with pytest.raises(UserError, match=message):
        clip_statistics(hypotheses, ReferenceCorpus([[["가"]], [["나"]]]))


@pytest.mark.parametrize(("truth", "message"), [([], "no references"), ([[["가"]], []], "Clip 1 has no reference")])
def test_references_that_are_missing_are_told(truth: list[list[list[str]]], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ReferenceCorpus(truth)


def test_memory_does_not_grow_with_the_ngrams_of_hypotheses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus_module, "CHUNK_TOKENS", 1 << 13)
    clips = 400
    counted = ReferenceCorpus([[["바다", "가", "보인다"]]] * clips)

    def said(length: int) -> Iterator[list[str]]:
        draw = random.Random(0)
        return ([KOREAN[draw.randrange(30)] for _ in range(length)] for _ in range(clips))

    def peak(length: int) -> int:
        tracemalloc.start()
        clip_statistics(said(length), counted)
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return size

    short, long = peak(60), peak(240)
    assert long < 1.5 * short


def test_references_are_tokenised_once_for_all_epochs() -> None:
    scores._COUNTED.clear()
    split: list[str] = []

    def note(text: str) -> list[str]:
        split.append(text)
        return text.split()

    tokenizer = type(get_tokenizer("char"))("noting", "1", note)
    truth = [["바다 가 보인다", "바다"], ["산 이 보인다"]]
    first = score_captions(
        ["바다 가", "산 이"], truth, tokenizer=tokenizer, metrics=["bleu_4", "meteor", "length_ratio"]
    )
    assert sorted(split) == sorted(["바다 가", "산 이", "바다 가 보인다", "바다", "산 이 보인다"])
    split.clear()
    again = score_captions(
        ["바다 가", "산 이"], [tuple(refs) for refs in truth], tokenizer=tokenizer, metrics=list(first)
    )
    assert again == first
    assert sorted(split) == ["바다 가", "산 이"]
    split.clear()
    truth[1][0] = "강 이 보인다"  # changed in place: a look at identities alone would miss it
    score_each(["바다 가", "산 이"], truth, tokenizer=tokenizer)
    assert "강 이 보인다" in split
    other = type(tokenizer)("noting", "2", list)
    assert score_captions(["바다 가", "산 이"], truth, tokenizer=other, metrics=["bleu_4"]) != first
    assert len(scores._COUNTED) == 2


def test_where_no_worker_starts_the_tokens_come_from_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> list[list[str]]:
        raise RuntimeError("A tokenizer process stopped")

    expected = score_captions(["바다가 보인다", "산"], [["바다"], ["산이 보인다"]], metrics=["bleu_1", "rouge_l"])
    scores._COUNTED.clear()
    monkeypatch.setattr("vlmcap.metrics.tokenizers.tokenize_in_processes", stop)
    monkeypatch.setattr("vlmcap.metrics.tokenizers.worker_count", lambda _: 2)
    assert (
        score_captions(["바다가 보인다", "산"], [["바다"], ["산이 보인다"]], metrics=["bleu_1", "rouge_l"]) == expected
    )
