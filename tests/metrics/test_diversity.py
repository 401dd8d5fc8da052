"""Diversity: known answers, and the warning of a collapsed model."""

from __future__ import annotations

import math
import random

import pytest
from pycocoevalcap.bleu.bleu import Bleu

from vlmcap.metrics.diversity import collapse_warning, distinct_ratio, repetition_rate, self_bleu

PLACES = ["바다", "산", "숲", "강", "도시", "마을", "공원", "시장", "다리", "학교"]
DISTINCT = [f"아침에 {place} 위로 해가 천천히 떠오른다" for place in PLACES]


def test_repetition_rate_is_the_share_of_repeated_4_grams() -> None:
    assert repetition_rate([list("abcdefgh")]) == 0
    # a a a a a a: three 4-grams, all the same.
    assert repetition_rate([["a"] * 6]) == pytest.approx(2 / 3)
    # Only what the caption itself has said counts, and captions of fewer tokens have none.
    assert repetition_rate([list("abcd"), list("abcd"), list("ab"), []]) == 0
    assert repetition_rate([list("abcdabcd"), list("efgh")]) == pytest.approx(1 / 6)
    assert repetition_rate([]) == repetition_rate([["a"]]) == 0


def test_self_bleu_equals_pycocoevalcap_of_each_against_all_others() -> None:
    generator = random.Random(3)
    captions = [generator.choices("abcde", k=generator.randint(4, 12)) for _ in range(9)]
    truth = {i: [" ".join(other) for j, other in enumerate(captions) if j != i] for i in range(9)}
    _, each = Bleu(4).compute_score(truth, {i: [" ".join(tokens)] for i, tokens in enumerate(captions)}, verbose=0)
    assert self_bleu(captions) == pytest.approx(sum(each[3]) / 9, rel=1e-9)


def test_self_bleu_of_same_and_of_disjoint_captions() -> None:
    assert self_bleu([list("abcdef")] * 5) == pytest.approx(1)
    assert self_bleu([list("abcd"), list("efgh"), list("ijkl")]) == pytest.approx(0, abs=1e-6)
    assert math.isnan(self_bleu([list("abcd")]))
    assert self_bleu([[], []]) == pytest.approx(0, abs=1e-3)


def test_self_bleu_samples_by_seed_and_its_cost_is_bounded() -> None:
    generator = random.Random(5)
    captions = [generator.choices("abcdefgh", k=12) for _ in range(400)]
    first = self_bleu(captions, captions=20, others=10)
    assert first == self_bleu(captions, captions=20, others=10)
    assert first != self_bleu(captions, captions=20, others=10, seed=1)
    read = set()

    class Watched(list[list[str]]):
        def __getitem__(self, index: int) -> list[str]:  # type: ignore[override]
            read.add(index)
            return super().__getitem__(index)

    self_bleu(Watched(captions), captions=20, others=10)
    assert len(read) <= 20 + 11


def test_collapse_is_told_in_one_sentence() -> None:
    assert collapse_warning(DISTINCT) is None
    said = collapse_warning([DISTINCT[0]] * 9 + [DISTINCT[1]])
    assert said is not None
    assert said.startswith("The captions have collapsed: only 20% of 10 are distinct, and 9 clips get '아침에 바다")
    assert said.endswith(".")
    assert "\n" not in said


def test_the_thresholds_are_those_documented() -> None:
    half = [text for text in DISTINCT[:5] for _ in range(2)]
    assert distinct_ratio(half) == 0.5
    assert collapse_warning(half) is None
    assert collapse_warning([*half[:9], half[0]]) is None
    assert collapse_warning(half + half[:1]) is not None
    # Two of four equal captions are no collapse: too few clips to tell.
    assert collapse_warning(half[:2]) is None
    assert collapse_warning([]) is None


def test_a_caption_in_a_loop_is_told() -> None:
    loops = [f"{place}에 해가 뜨고 " * 6 for place in PLACES]
    said = collapse_warning(loops)
    assert said is not None
    assert said.startswith("The captions repeat themselves: ")
    # One such caption among a hundred others is no reason to warn.
    others = [f"{place}에서 {other}까지 길이 길게 이어진다" for place in PLACES for other in PLACES]
    assert collapse_warning([*others, loops[0]]) is None
