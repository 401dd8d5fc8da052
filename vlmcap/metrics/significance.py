"""Confidence intervals and significance tests over clips, for any caption score, corpus scores included.

    a, b = clip_metrics(statistics_of_run_a)["cider"], clip_metrics(statistics_of_run_b)["cider"]
    bootstrap(a)            # the score with its confidence interval
    paired_bootstrap(a, b)  # the difference with its interval and p-value
    compare_runs({"mlp": a, "perceiver": b, ...}, baseline="mlp")  # many runs, Holm-corrected

Every score here is a function of numbers summed over clips (`ClipMetric`), so a resample of the clips is a row of
counts times a matrix: no caption is scored again. `scipy.stats.bootstrap` calls the statistic on index arrays instead,
and its jackknife takes N^2 numbers, which is why the resampling is our own. Document frequencies, and so each clip's
CIDEr, are those of the full reference corpus: they belong to the test set, not to the sample of clips, and a resample
that counted them again would treat its repeated clips as common.

A bootstrap of few clips is overconfident in two ways (Hesterberg, "What teachers should know about the bootstrap", The
American Statistician 2015): it takes the spread of N clips for that of all clips, and it puts the skew of a score on
the wrong side. So

- a difference of two runs, which is hardly skewed as both are scored on the same clips, has its resampled deviations
  widened until their tails are those of Student's t with N - 1 degrees of freedom;
- a run's own score, which is skewed, has a BCa interval (Efron, "Better bootstrap confidence intervals", JASA 1987) at
  the levels of Student's t. BCa of a difference would cover less often than the widened quantiles do, and a studentized
  interval of a score that depends on few clips can leave its range.

`benchmarks/metrics/coverage.py` measures all of them; docs/explanation/korean_scores.md has the results.

Only clips are resampled. Clips of one video are not independent, and the variation over training seeds is not included:
an interval is too narrow where either matters.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from scipy.special import ndtr, ndtri, stdtrit

from vlmcap.errors import UserError
from vlmcap.metrics.clip_metrics import ClipMetric, Floats

# Resamples are drawn in chunks: counts of 1 000 resamples of 40 000 clips would take 320 MB.
# Counts per chunk, 32 MB in float64.
_CHUNK_ELEMENTS = 1 << 22


@dataclass(frozen=True, slots=True)
class Interval:
    """A score with its confidence interval.

    Attributes:
        score: Score of all clips.
        low: Lower end of the interval.
        high: Upper end of the interval.
        confidence: Confidence level between 0 and 1.
    """

    score: float
    low: float
    high: float
    confidence: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """Comparison of two runs on the same clips.

    Attributes:
        difference: Score of the second run minus that of the first.
        low: Lower end of the difference's confidence interval; NaN from `approximate_randomization`, which gives none.
        high: Upper end of the interval.
        p_value: Probability of a difference at least as large, of either sign, if the runs are equally good; above 0,
            at most 1.
        adjusted_p_value: The p-value after Holm's correction if several runs were compared; else equal to `p_value`.
    """

    difference: float
    low: float
    high: float
    p_value: float
    adjusted_p_value: float


class Resampled(NamedTuple):
    """One score on resampled clips, shape (R,) each.

    Attributes:
        single: Draws whose quantiles are the BCa interval of the score.
        paired: Draws that, minus those of another score on the same resamples, give the interval of the difference.
    """

    single: Floats
    paired: Floats


def bootstrap(
    metric: ClipMetric,
    *,
    resamples: int = 1000,
    confidence: float = 0.95,
    method: Literal["bca", "percentile"] = "bca",
    seed: int = 0,
) -> Interval:
    """Computes the score with its bootstrap confidence interval over clips.

    Args:
        metric: Statistics of the clips and the score of their sums.
        resamples: Number of samples of as many clips, with replacement, at least 2; below 1 000 the ends are imprecise.
        confidence: Confidence level between 0 and 1.
        method: "bca" corrects bias and skew, and allows for few clips; "percentile" uses plain quantiles of the
            resampled scores, like many other tools, and covers too rarely below some hundred clips.
        seed: Seed of the samples.

    Returns:
        The score and the interval; the ends are NaN if the score is NaN.

    Raises:
        UserError: A number is out of range, or there is no clip.
    """
    if method not in ("bca", "percentile"):
        raise UserError(f"Unknown interval {method!r}; choose percentile or bca.")
    check_resampling(metric, resamples=resamples, confidence=confidence)
    samples = np.concatenate([metric.score(sums) for sums in resampled_sums([metric.values], resamples, seed)])
    draws = samples if method == "percentile" else resampled(metric, samples, seed).single
    low, high = _interval_ends(draws, confidence)
    return Interval(metric.corpus_score(), low, high, confidence)


def paired_bootstrap(
    first: ClipMetric, second: ClipMetric, *, resamples: int = 1000, confidence: float = 0.95, seed: int = 0
) -> Comparison:
    """Tests the second run against the first by resampling clips (Koehn, "Statistical significance tests", EMNLP 2004).

    Both runs are scored on the same resamples, so that easy and hard clips cancel out. The p-value is two-sided: (1 +
    k) / (1 + resamples), where k resamples have a difference, with widened tails, at least as far from the observed one
    as that is from zero.

    Args:
        first: Run to compare with.
        second: Run in question, with the same clips in the same order.
        resamples: As in `bootstrap`.
        confidence: Confidence level of the interval of the difference.
        seed: Seed of the samples.

    Returns:
        The comparison.

    Raises:
        UserError: The runs differ in clips or score, a number is out of range, or there is no clip.

    Example:
        >>> from vlmcap.metrics.clip_metrics import mean_metric
        >>> first = mean_metric("rouge_l", np.linspace(0.2, 0.6, 50))
        >>> second = mean_metric("rouge_l", np.linspace(0.3, 0.7, 50))
        >>> comparison = paired_bootstrap(first, second)
        >>> round(comparison.difference, 3)
        0.1
    """
    check_resampling(first, second, resamples=resamples, confidence=confidence)
    columns = first.values.shape[1]
    samples = np.concatenate(
        [
            # Both runs get the same resampled clips: columns of the first run, then of the second.
            second.score(sums[:, columns:]) - first.score(sums[:, :columns])
            for sums in resampled_sums([first.values, second.values], resamples, seed)
        ]
    )
    difference = second.corpus_score() - first.corpus_score()
    samples = _widened(samples, difference, len(first.values), seed)
    low, high = _interval_ends(samples, confidence)
    # Centred on 0, the resamples show which differences equally good runs would have.
    p_value = _p_value(samples - difference, difference)
    return Comparison(difference, low, high, p_value, p_value)


def resampled(metric: ClipMetric, samples: Floats, seed: int) -> Resampled:
    """Returns the draws from which intervals of a score and of its differences are computed.

    Args:
        metric: Statistics of the clips and the score of their sums.
        samples: Score on resampled clips, shape (R,).
        seed: Seed of the resamples, which scores must share if their differences are taken.
    """
    clips, score = len(metric.values), metric.corpus_score()
    # Levels of the sorted resamples; 0 and 1 would give infinite deviates.
    positions = np.clip(np.linspace(0, 1, len(samples)), 0.5 / len(samples), 1 - 0.5 / len(samples))
    levels = _bca_levels(_student_deviates(positions, clips), samples, score, metric)
    draws = np.empty_like(samples)
    # As many draws, at the positions of the resamples.
    draws[np.argsort(samples, kind="stable")] = np.quantile(samples, levels)
    return Resampled(draws, _widened(samples, score, clips, seed))


def approximate_randomization(
    first: ClipMetric, second: ClipMetric, *, resamples: int = 1000, seed: int = 0
) -> Comparison:
    """Tests the second run against the first by swapping captions (Riezler and Maxwell, ACL 2005 workshop on MT).

    If the runs are equally good, it does not matter which run a caption comes from: the p-value is the share of random
    swaps that give a difference at least as large, of either sign. It assumes less about the clips than the bootstrap,
    and gives no interval.

    Args:
        first: Run to compare with.
        second: Run in question, with the same clips in the same order.
        resamples: Number of random assignments, at least 2.
        seed: Seed of the assignments.

    Returns:
        The comparison, with a NaN interval.

    Raises:
        UserError: As in `paired_bootstrap`.
    """
    check_resampling(first, second, resamples=resamples, confidence=0.5)
    change = second.values - first.values  # (N, K): what moves from one total to the other if a clip is swapped
    total_first, total_second = first.values.sum(0), second.values.sum(0)
    rng = np.random.default_rng(seed)
    samples = []
    for size in chunk_sizes(resamples, len(change)):
        moved = (rng.random((size, len(change))) < 0.5).astype(np.float64) @ change  # (size, N) @ (N, K)
        samples.append(second.score(total_second - moved) - first.score(total_first + moved))
    difference = second.corpus_score() - first.corpus_score()
    p_value = _p_value(np.concatenate(samples), difference)
    return Comparison(difference, math.nan, math.nan, p_value, p_value)


def holm(p_values: Sequence[float]) -> list[float]:
    """Corrects p-values for multiple tests, so that the chance of any false claim stays below the level (Holm, 1979).

    The smallest of m is multiplied by m, the next by m - 1, and so on; none is below the previous one or above 1.

    Args:
        p_values: Any number of p-values between 0 and 1, of tests that need not be independent. NaN stays NaN and is
            not counted.

    Returns:
        The corrected p-values in the same order.

    Raises:
        UserError: A p-value is below 0 or above 1.
    """
    for p_value in p_values:
        if p_value < 0 or p_value > 1:
            raise UserError(f"A p-value must be between 0 and 1, not {p_value}.")
    adjusted = [math.nan] * len(p_values)
    order = sorted(
        (index for index, p_value in enumerate(p_values) if not math.isnan(p_value)), key=p_values.__getitem__
    )
    largest = 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def compare_runs(
    runs: Mapping[str, ClipMetric], *, baseline: str, resamples: int = 1000, confidence: float = 0.95, seed: int = 0
) -> dict[str, Comparison]:
    """Compares each other run with the baseline by `paired_bootstrap`, with Holm-corrected p-values.

    Args:
        runs: Name to metric, all on the same clips in the same order.
        baseline: Name of the run that the others are compared with.
        resamples: As in `bootstrap`. A p-value is at least 1 / (1 + resamples), so use well above 20 m for m runs.
        confidence: Confidence level of each interval; the intervals are not corrected.
        seed: Seed of the samples, the same for every run.

    Returns:
        Name to comparison, without the baseline, in the given order.

    Raises:
        UserError: The baseline is not among the runs, or as in `paired_bootstrap`.
    """
    if baseline not in runs:
        raise UserError(f"There is no run {baseline!r} to compare with; choose one of {', '.join(runs)}.")
    options: dict[str, Any] = {"resamples": resamples, "confidence": confidence, "seed": seed}
    tests = {name: paired_bootstrap(runs[baseline], run, **options) for name, run in runs.items() if name != baseline}
    corrected = holm([comparison.p_value for comparison in tests.values()])
    return {
        name: Comparison(c.difference, c.low, c.high, c.p_value, adjusted)
        for (name, c), adjusted in zip(tests.items(), corrected, strict=True)
    }


def check_resampling(*metrics: ClipMetric, resamples: int, confidence: float) -> None:
    """Checks that the numbers are in range and that the metrics have the same score and number of clips.

    Raises:
        UserError: They do not, or there is no clip.
    """
    if resamples < 2:
        raise UserError(f"resamples must be at least 2, not {resamples}.")
    if not 0 < confidence < 1:
        raise UserError(f"confidence must be between 0 and 1, not {confidence}.")
    shapes = [metric.values.shape for metric in metrics]
    if shapes[0][0] == 0:
        raise UserError("There are no clips to resample; give at least one.")
    if len(set(shapes)) > 1 or len({metric.name for metric in metrics}) > 1:
        given = " and ".join(f"{metric.name} of {len(metric.values)} clips" for metric in metrics)
        raise UserError(f"Runs must be compared by one score on the same clips, not by {given}.")


def chunk_sizes(resamples: int, clips: int) -> Iterator[int]:
    """Yields the numbers of resamples to draw at a time."""
    size = max(1, _CHUNK_ELEMENTS // clips)
    for start in range(0, resamples, size):
        yield min(size, resamples - start)


def resampled_sums(values: Sequence[Floats], resamples: int, seed: int) -> Iterator[Floats]:
    """Yields sums over resampled clips, with the arrays concatenated, in chunks of resamples.

    The clips are determined by the seed, the number of resamples and N.
    """
    together = np.concatenate(values, axis=1)
    clips = len(together)
    rng = np.random.default_rng(seed)
    for size in chunk_sizes(resamples, clips):
        counts = rng.multinomial(clips, np.full(clips, 1 / clips), size=size).astype(np.float64)
        yield counts @ together  # (size, N) @ (N, K of all arrays)


def _bca_levels(deviates: Floats, samples: Floats, score: float, metric: ClipMetric) -> Floats:
    """Returns the levels of the samples' quantiles at standard deviates, corrected for bias and skew.

    The bias is the share of resamples below the score, the skew the effect of leaving out a clip.
    """
    below = ((samples < score).mean() + (samples <= score).mean()) / 2
    if not 0 < below < 1:  # all resamples are on one side, so no correction is defined, as if all clips have one score
        return ndtr(deviates)
    left_out = metric.score(metric.values.sum(0) - metric.values)  # (N,): the jackknife, without one clip each
    deviations = left_out.mean() - left_out
    spread = float((deviations**2).sum() ** 1.5)
    skew = float((deviations**3).sum()) / (6 * spread) if spread > 0 else 0.0
    shifted = ndtri(below) + deviates
    return ndtr(ndtri(below) + shifted / (1 - skew * shifted))


def _student_deviates(levels: Floats, clips: int) -> Floats:
    """Returns the deviates of Student's t, scaled for a mean of `clips` clips whose spread is unknown."""
    return stdtrit(clips - 1, levels) * math.sqrt(clips / (clips - 1)) if clips > 1 else ndtri(levels)


def _widened(samples: Floats, score: float, clips: int, seed: int) -> Floats:
    """Widens the samples about the score from normal tails to those of Student's t.

    The factors depend only on the sizes of the arguments and the seed, so that a difference of widened scores is the
    widened difference.
    """
    if clips < 2:
        return samples
    squares = np.random.default_rng([seed, 2]).chisquare(clips - 1, len(samples))
    return score + (samples - score) * np.sqrt(clips / squares)


def _interval_ends(samples: Floats, confidence: float) -> tuple[float, float]:
    low, high = np.quantile(samples, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def _p_value(null: Floats, difference: float) -> float:
    if math.isnan(difference):
        return math.nan
    # Differences that are equal up to rounding count as equal, or equal captions would differ significantly.
    extreme = np.abs(null) >= abs(difference) - 1e-12 * max(1.0, abs(difference))
    return float((1 + extreme.sum()) / (1 + len(null)))
