"""Comparing runs: against naive loops, against simulated truth, and against hand examples."""

from __future__ import annotations

import math
import random
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import scipy.special
import scipy.stats

from vlmcap.errors import UserError
from vlmcap.metrics import significance
from vlmcap.metrics.clip_metrics import ClipMetric, clip_metrics, content_metric, mean_metric, meteor_metric
from vlmcap.metrics.content import content_counts, content_scores
from vlmcap.metrics.corpus import ClipStatistics, ReferenceCorpus, by_category, clip_statistics, corpus_scores
from vlmcap.metrics.meteor import corpus_meteor, corpus_meteor_ko, meteor_ko_statistics, meteor_statistics
from vlmcap.metrics.significance import approximate_randomization, bootstrap, compare_runs, holm, paired_bootstrap

WORDS = ["바다", "산", "에서", "사람", "이", "개", "가", "왼쪽", "으로", "달린다", "걷는다", "."]
NAMES = ["bleu_1", "bleu_2", "bleu_3", "bleu_4", "cider", "cider_d", "rouge_l"]
Captions = list[list[str]]


def corpus(clips: int, length: int = 12, seed: int = 0) -> list[Captions]:
    generator = random.Random(seed)
    return [[generator.choices(WORDS, k=length) for _ in range(generator.randint(1, 3))] for _ in range(clips)]


def noisy(references: list[Captions], share: float, seed: int) -> Captions:
    """The first references with a share of words replaced: a model whose quality is known."""
    generator = random.Random(seed)
    return [
        [generator.choice(WORDS) if generator.random() < share else word for word in refs[0]] for refs in references
    ]


def statistics(clips: int = 30, share: float = 0.4, seed: int = 1) -> ClipStatistics:
    references = corpus(clips)
    return clip_statistics(noisy(references, share, seed), ReferenceCorpus(references))


def samples_of(clips: int, resamples: int, seed: int) -> list[Any]:
    counts = np.random.default_rng(seed).multinomial(clips, np.full(clips, 1 / clips), size=resamples)
    return [np.repeat(np.arange(clips), row) for row in counts]


@pytest.mark.parametrize("name", NAMES)
def test_bootstrap_equals_a_loop_that_scores_each_resample(name: str) -> None:
    first, second = statistics(seed=1), statistics(seed=2, share=0.3)
    rows = samples_of(30, 50, seed=7)
    scores = [corpus_scores(first.take(row))[name] for row in rows]
    interval = bootstrap(clip_metrics(first)[name], resamples=50, confidence=0.9, method="percentile", seed=7)
    assert interval.score == pytest.approx(corpus_scores(first)[name])
    assert (interval.low, interval.high) == pytest.approx(tuple(np.quantile(scores, [0.05, 0.95])))

    change = corpus_scores(second)[name] - corpus_scores(first)[name]
    wider = np.sqrt(
        30 / np.random.default_rng([7, 2]).chisquare(29, 50)
    )  # tails of Student's t with 29 degrees of freedom
    moved = [corpus_scores(second.take(row))[name] - score for row, score in zip(rows, scores, strict=True)]
    differences = change + (np.array(moved) - change) * wider
    found = paired_bootstrap(
        clip_metrics(first)[name], clip_metrics(second)[name], resamples=50, confidence=0.9, seed=7
    )
    assert found.difference == pytest.approx(change)
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(differences, [0.05, 0.95])))
    far = sum(abs(difference - found.difference) >= abs(found.difference) for difference in differences)
    assert found.p_value == found.adjusted_p_value == pytest.approx((1 + far) / 51)


@pytest.mark.parametrize("name", ["bleu_4", "cider"])
def test_randomization_equals_a_loop_that_swaps_clips(name: str) -> None:
    references = corpus(12)
    counted = ReferenceCorpus(references)
    one, two = noisy(references, 0.5, 1), noisy(references, 0.3, 2)
    first, second = (clip_metrics(clip_statistics(run, counted))[name] for run in (one, two))
    found = approximate_randomization(first, second, resamples=40, seed=5)
    swaps = (np.random.default_rng(5).random((40, 12)) < 0.5).astype(int)
    far = 0
    for swap in swaps:
        mixed = [
            [pair[bit] for pair, bit in zip(zip(one, two, strict=True), bits, strict=True)] for bits in (swap, 1 - swap)
        ]
        scores = [corpus_scores(clip_statistics(run, counted))[name] for run in mixed]
        far += abs(scores[1] - scores[0]) >= abs(found.difference) - 1e-12
    assert found.p_value == pytest.approx((1 + far) / 41)
    assert math.isnan(found.low)


def test_document_frequencies_are_those_of_the_whole_corpus() -> None:
    # A resample keeps each clip's CIDEr: scored anew, a clip drawn twice would make its own words common.
    whole = statistics()
    assert by_category(whole, range(30))[4]["cider"] == pytest.approx(float(whole.cider[4]))
    half = by_category(whole, ["가"] * 15 + ["나"] * 15)
    assert (half["가"]["cider"] + half["나"]["cider"]) / 2 == pytest.approx(corpus_scores(whole)["cider"])
    references = corpus(30)[:15]
    alone = corpus_scores(clip_statistics(noisy(corpus(30), 0.4, 1)[:15], ReferenceCorpus(references)))
    assert half["가"]["cider"] != pytest.approx(alone["cider"], rel=1e-3)
    assert half["가"]["bleu_4"] == pytest.approx(alone["bleu_4"])


def test_means_of_batches_are_not_the_corpus_score() -> None:
    references = corpus(40, seed=3)
    predictions = noisy(references, 0.4, 4)
    whole = corpus_scores(clip_statistics(predictions, ReferenceCorpus(references)))
    batches = [
        corpus_scores(clip_statistics(predictions[i : i + 4], ReferenceCorpus(references[i : i + 4])))
        for i in range(0, 40, 4)
    ]
    for name, least in (("cider", 0.05), ("bleu_4", 0.005)):
        assert abs(sum(batch[name] for batch in batches) / 10 / whole[name] - 1) > least, name


def test_meteor_and_content_words_are_resampled_as_counts() -> None:
    predictions = ["개가 달린다", "사람이 왼쪽으로 걷는다", "바다에 해가 뜬다", ""]
    references = [["개가 뛴다"], ["사람이 걸었다", "사람"], ["해가 지는 바다"], ["산"]]
    tokens = [[text.split() for text in refs] for refs in references]
    plain = [meteor_statistics(text.split(), refs) for text, refs in zip(predictions, tokens, strict=True)]
    assert meteor_metric(plain).corpus_score() == pytest.approx(
        corpus_meteor([text.split() for text in predictions], tokens)
    )
    korean = meteor_metric(meteor_ko_statistics(predictions, references), "meteor_ko")
    assert korean.corpus_score() == pytest.approx(corpus_meteor_ko(predictions, references))
    counts = content_counts(predictions, references)
    for name in ("content_f1", "content_recall", "content/noun_recall"):
        assert content_metric(counts, name).corpus_score() == pytest.approx(
            content_scores(predictions, references)[name]
        )
    for metric in (korean, content_metric(counts)):
        interval = bootstrap(metric, resamples=200)
        assert 0 <= interval.low <= interval.score <= interval.high <= 1
    with pytest.raises(UserError, match="Unknown content score 'f1'"):
        content_metric(counts, "f1")


@pytest.mark.parametrize("method", ["percentile", "bca"])
def test_intervals_cover_the_truth_as_often_as_they_say(method: Any) -> None:
    rng = np.random.default_rng(11)
    covered = 0
    for trial in range(300):
        interval = bootstrap(
            mean_metric("x", rng.exponential(size=80)), resamples=400, confidence=0.9, method=method, seed=trial
        )
        covered += interval.low <= 1 <= interval.high
    # 300 trials at 0.9 have a standard deviation of 0.017; skewed data cost the bootstrap a little.
    assert 0.83 <= covered / 300 <= 0.95


@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_bca_is_that_of_scipy_but_for_the_tails_of_student(confidence: float, monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(3).exponential(size=60)
    metric = mean_metric("x", values)
    samples = np.concatenate([metric.score(sums) for sums in significance.resampled_sums([metric.values], 5000, 4)])
    known = SimpleNamespace(bootstrap_distribution=samples)
    options: dict[str, Any] = {
        "n_resamples": 0,
        "method": "BCa",
        "confidence_level": confidence,
        "bootstrap_result": known,
    }
    expected = scipy.stats.bootstrap((values,), np.mean, **options).confidence_interval
    wider = bootstrap(metric, resamples=5000, confidence=confidence, seed=4)
    monkeypatch.setattr(significance, "_student_deviates", lambda levels, clips: scipy.special.ndtri(levels))
    found = bootstrap(metric, resamples=5000, confidence=confidence, seed=4)
    width = expected.high - expected.low
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-4 * width)
    assert width < wider.high - wider.low < 1.1 * width


def test_few_skewed_clips_are_covered_more_often_by_bca_and_equal_runs_seldom_differ() -> None:
    """`benchmarks/metrics/coverage.py` has more trials; 600 at 0.93 have a standard deviation of 0.010."""
    rng = np.random.default_rng(17)
    covered = {"bca": 0, "percentile": 0}
    false = 0
    for trial in range(600):
        metric = mean_metric("x", rng.gamma(0.35, size=30))
        for method in covered:
            interval = bootstrap(metric, resamples=200, method=method, seed=trial)  # type: ignore[arg-type]
            covered[method] += interval.low <= 0.35 <= interval.high
        first, second = (mean_metric("x", rng.normal(size=30)) for _ in range(2))
        false += paired_bootstrap(first, second, resamples=200, seed=trial).p_value <= 0.05
    assert covered["percentile"] + 8 < covered["bca"]
    assert covered["bca"] / 600 > 0.875  # quantiles of 200 resamples are rough
    assert 0.03 < false / 600 < 0.065


def test_bca_moves_the_interval_of_a_skewed_score_towards_its_tail() -> None:
    values = np.random.default_rng(2).exponential(size=40)
    percentile, bca = (
        bootstrap(mean_metric("x", values), resamples=2000, method=method) for method in ("percentile", "bca")
    )
    assert bca.low > percentile.low
    assert bca.high > percentile.high


@pytest.mark.parametrize("test", [paired_bootstrap, approximate_randomization])
def test_equal_models_seem_different_as_rarely_as_the_level_says_and_better_ones_are_found(test: Any) -> None:
    rng = np.random.default_rng(5)
    false = found = 0
    for trial in range(300):
        hardness = rng.normal(size=60)  # clips are hard or easy for both runs: pairing takes that away
        first, second = (mean_metric("x", hardness + rng.normal(scale=0.5, size=60)) for _ in range(2))
        better = mean_metric("x", second.values[:, 0] + 0.4)
        false += test(first, second, resamples=200, seed=trial).p_value <= 0.05
        found += test(first, better, resamples=200, seed=trial).p_value <= 0.05
    assert 0.02 <= false / 300 <= 0.09
    assert found / 300 > 0.95


def test_a_run_equals_itself() -> None:
    metric = clip_metrics(statistics())["bleu_4"]
    for comparison in (
        paired_bootstrap(metric, metric, resamples=20),
        approximate_randomization(metric, metric, resamples=20),
    ):
        assert comparison.difference == 0
        assert comparison.p_value == 1


def test_holm_by_hand() -> None:
    # 4 * 0.005, 3 * 0.01, 2 * 0.03, 1 * 0.04 raised to the one before it.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1, 1]
    assert holm([]) == []
    assert holm([0.02]) == [0.02]
    corrected = holm([0.01, math.nan, 0.02])
    assert math.isnan(corrected[1])
    assert [corrected[0], corrected[2]] == pytest.approx([0.02, 0.02])
    with pytest.raises(UserError, match="between 0 and 1"):
        holm([1.5])


def test_many_runs_are_compared_with_the_baseline_and_corrected() -> None:
    runs = {
        name: clip_metrics(statistics(60, share, seed))["cider"]
        for name, share, seed in (("a", 0.5, 1), ("b", 0.1, 2), ("c", 0.5, 3))
    }
    found = compare_runs(runs, baseline="a")
    assert list(found) == ["b", "c"]
    assert found["b"].adjusted_p_value == pytest.approx(2 / 1001)
    assert found["b"].low > 0
    assert found["c"].adjusted_p_value > 0.05
    assert found["c"].p_value == paired_bootstrap(runs["a"], runs["c"]).p_value
    with pytest.raises(UserError, match="no run 'd' to compare with; choose one of a, b, c"):
        compare_runs(runs, baseline="d")


def test_categories_are_scored_as_their_clips_alone() -> None:
    whole = statistics()
    labels = ["바다" if index % 3 else None for index in range(30)]
    found = by_category(whole, labels)
    assert list(found) == [None, "바다"]
    assert found["바다"]["clips"] == 20
    mask = np.array([label == "바다" for label in labels])
    assert {name: found["바다"][name] for name in NAMES} == pytest.approx(
        corpus_scores(whole.take(np.flatnonzero(mask)))
    )
    with pytest.raises(UserError, match="2 categories for 30 clips"):
        by_category(whole, ["가", "나"])


def test_a_corpus_of_one_clip_has_no_cider_interval_and_says_nothing_false() -> None:
    lone = clip_statistics([["개"]], ReferenceCorpus([[["개", "가"]]]))
    metric = clip_metrics(lone)["cider"]
    assert all(math.isnan(value) for value in (bootstrap(metric, method="bca").score, bootstrap(metric).low))
    assert math.isnan(paired_bootstrap(metric, metric).p_value)


def test_chunks_of_resamples_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = (clip_metrics(statistics(seed=seed))["bleu_4"] for seed in (1, 2))
    whole = paired_bootstrap(first, second, resamples=100), approximate_randomization(first, second, resamples=100)
    monkeypatch.setattr("vlmcap.metrics.significance._CHUNK_ELEMENTS", 100)
    assert paired_bootstrap(first, second, resamples=100) == whole[0]
    assert approximate_randomization(first, second, resamples=100).p_value == whole[1].p_value


def test_a_thousand_resamples_of_a_thousand_clips_take_seconds() -> None:
    references = corpus(1000)
    counted = ReferenceCorpus(references)
    first, second = (clip_metrics(clip_statistics(noisy(references, 0.4, seed), counted)) for seed in (1, 2))
    start = time.perf_counter()
    for name in ("bleu_4", "cider"):
        bootstrap(first[name])
        paired_bootstrap(first[name], second[name])
        approximate_randomization(first[name], second[name])
    assert time.perf_counter() - start < 12  # about 1 s on one quiet core


METRIC = mean_metric("x", [1.0, 2.0])
WRONG: dict[str, tuple[Any, str]] = {
    "resamples": (lambda: bootstrap(METRIC, resamples=1), "resamples must be at least 2, not 1"),
    "confidence": (lambda: bootstrap(METRIC, confidence=95), "confidence must be between 0 and 1, not 95"),
    "method": (lambda: bootstrap(METRIC, method="t"), "choose percentile or bca"),  # type: ignore[arg-type]
    "no clips": (lambda: bootstrap(mean_metric("x", [])), "no clips"),
    "unequal": (lambda: paired_bootstrap(METRIC, mean_metric("x", [1.0])), "x of 2 clips and x of 1 clips"),
    "other score": (
        lambda: approximate_randomization(METRIC, mean_metric("y", [1.0, 2.0])),
        "x of 2 clips and y of 2 clips",
    ),
    "no number a clip": (lambda: mean_metric("x", [[1.0]]), "one number per clip"),
}


@pytest.mark.parametrize("case", WRONG)
def test_mistakes_end_in_one_sentence(case: str) -> None:
    call, message = WRONG[case]
    with pytest.raises(UserError, match=message) as caught:
        call()
    assert str(caught.value).endswith(".")


def test_metrics_of_one_name_are_compared_whatever_their_object() -> None:
    assert isinstance(METRIC, ClipMetric)
    assert METRIC.corpus_score() == 1.5
