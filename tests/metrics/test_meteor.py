"""METEOR: the fast alignment, the jar itself where there is Java, and the Korean stem stage."""

from __future__ import annotations

import random
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.metrics.plain_meteor import align
from vlmcap.metrics import meteor
from vlmcap.metrics.meteor import (
    corpus_meteor,
    corpus_meteor_ko,
    meteor_from_statistics,
    meteor_ko_statistics,
    sentence_meteor,
)

needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="compares with METEOR's jar, which needs Java")
JAR_LINE = "Final score:"


def captions(words: int, length: int, seed: int) -> list[list[str]]:
    """Captions over few words, frequent ones among them: where most matches leave a choice."""
    generator = random.Random(seed)
    vocabulary = [f"낱{index}" for index in range(words)]
    return [
        generator.choices(vocabulary, [1 / (index + 1) for index in range(words)], k=generator.randint(1, length))
        for _ in range(40)
    ]


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from("abcde"), max_size=14), st.lists(st.sampled_from("abcdef"), max_size=14))
def test_alignment_equals_the_plain_one(hypothesis: list[str], reference: list[str]) -> None:
    assert meteor._align(hypothesis, reference) == align(hypothesis, reference)


@pytest.mark.parametrize(("words", "length"), [(4, 30), (30, 120), (400, 150)])
def test_alignment_of_long_captions_equals_the_plain_one(words: int, length: int) -> None:
    drawn = captions(words, length, seed=words)
    for hypothesis, reference in zip(drawn[::2], drawn[1::2], strict=True):
        assert meteor._align(hypothesis, reference) == align(hypothesis, reference)


@needs_java
def test_meteor_equals_the_jar_run_here(tmp_path: Path) -> None:
    pycocoevalcap_meteor = pytest.importorskip("pycocoevalcap.meteor.meteor")
    jar = Path(pycocoevalcap_meteor.__file__).parent / "meteor-1.5.jar"
    drawn = captions(60, 110, seed=1) + captions(8, 30, seed=2)
    hypotheses, references = drawn[::2], drawn[1::2]
    for name, lines in (("hypotheses", hypotheses), ("references", references)):
        (tmp_path / name).write_text("".join(" ".join(tokens) + "\n" for tokens in lines), encoding="utf-8")
    command = [
        "java",
        "-Xmx1G",
        "-Dfile.encoding=UTF-8",
        "-jar",
        str(jar),
        "hypotheses",
        "references",
        "-l",
        "en",
        "-m",
        "exact",
    ]
    said = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, encoding="utf-8", check=True, timeout=120
    ).stdout
    segments = [float(line.split("\t")[-1]) for line in said.splitlines() if line.startswith("Segment ")]
    final = next(float(line.removeprefix(JAR_LINE)) for line in said.splitlines() if line.startswith(JAR_LINE))
    one_each = [[reference] for reference in references]
    assert sentence_meteor(hypotheses, one_each) == pytest.approx(segments, abs=1e-9)
    assert corpus_meteor(hypotheses, one_each) == pytest.approx(final, abs=1e-9)


def test_a_reference_given_twice_changes_nothing() -> None:
    hypothesis, reference = ["개", "가", "달린다"], ["개", "는", "달린다"]
    assert corpus_meteor([hypothesis], [[reference, reference]]) == corpus_meteor([hypothesis], [[reference]])


def meteor_ko(prediction: str, *references: str) -> float:
    return corpus_meteor_ko([prediction], [list(references)])


def test_inflected_verbs_match_at_their_stem() -> None:
    reference = "사람이 천천히 달렸다."
    inflected, other = meteor_ko("사람이 천천히 달립니다.", reference), meteor_ko("사람이 천천히 걷습니다.", reference)
    assert inflected > 1.4 * other
    whitespace = sentence_meteor([["사람이", "천천히", "달립니다."]], [[reference.split()]])[0]
    assert inflected > whitespace


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("개가 달린다", "사람이 달린다"),
        ("개를 본다", "사람을 본다"),
        ("바다와 하늘", "산과 하늘"),
        ("바다로 간다", "산으로 간다"),
        ("달렸다", "먹었다"),
        ("달립니다", "먹습니다"),
    ],
)
def test_forms_that_sound_alone_chooses_are_one(one: str, other: str) -> None:
    counts = meteor_ko_statistics([one], [[other]])[0]
    # All but the one content word that differs: the particles and endings match as well.
    assert counts.hypothesis_weight == counts.reference_weight
    assert counts.matched_weight == pytest.approx(counts.hypothesis_weight - 0.75)
    assert counts.matches >= 1


def test_a_particle_weighs_a_third_of_a_noun() -> None:
    reference = "개가 공원에서 달린다."
    wrong_particle, wrong_noun = (
        meteor_ko("개가 공원으로 달린다.", reference),
        meteor_ko("개가 시장에서 달린다.", reference),
    )
    assert 1 > wrong_particle > wrong_noun > 0


def test_content_words_never_match_function_words() -> None:
    # 이 is the tooth or the number here, and a particle there.
    assert meteor_ko_statistics(["사람이"], [["이 두 개"]])[0].matches == 0


def test_equal_captions_are_perfect_and_strange_ones_are_nothing() -> None:
    assert meteor_ko("바닷가에서 사람이 달립니다.", "바닷가에서 사람이 달립니다.") == 1
    assert meteor_ko("", "바다") == meteor_ko("바다", "") == meteor_ko("바다", "하늘") == 0
    assert meteor_ko("바다\u2028입니다", "바다 입니다") == 1


def test_corpus_score_is_that_of_the_summed_counts() -> None:
    predictions, references = (
        ["개가 달린다", "사람이 왼쪽으로 걸어간다"],
        [["개가 뛴다"], ["아이가 왼쪽으로 걸었다", "사람"]],
    )
    one, two = meteor_ko_statistics(predictions, references)
    assert corpus_meteor_ko(predictions, references) == meteor_from_statistics(one + two)
