"""Resampling of clips: a row of counts times a matrix of statistics. `vlmcap.metrics.significance` says what it is for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import numpy as np

from vlmcap.errors import UserError
from vlmcap.metrics.clip_metrics import ClipMetric, Floats

# Resamples are drawn some at a time: counts of 1 000 resamples of 40 000 clips would take 320 MB.
_CHUNK_ELEMENTS = 1 << 22


@dataclass(frozen=True, slots=True)
class Interval:
    """A score and where it may lie.

    Attributes:
        score: The score of all clips.
        low: Lower end of the interval.
        high: Upper end.
        confidence: Between 0 and 1.
    """

    score: float
    low: float
    high: float
    confidence: float


def bootstrap(
    metric: ClipMetric,
    *,
    resamples: int = 1000,
    confidence: float = 0.95,
    method: Literal["percentile", "bca"] = "percentile",
    seed: int = 0,
) -> Interval:
    """The score with its bootstrap confidence interval over clips (Efron, "Better bootstrap confidence intervals", JASA 1987).

    Args:
        metric: The clips' statistics and the score of their sums.
        resamples: Samples of as many clips, with replacement, at least 2; below 1 000 the ends are rough.
        confidence: Between 0 and 1.
        method: "percentile" takes quantiles of the resampled scores; "bca" also corrects their bias and skew, worth it for few clips or
            scores near an end of their scale.
        seed: Chooses the samples.

    Returns:
        The score and the interval; NaN ends where the score is NaN.

    Raises:
        UserError: A number is out of range, or there is no clip.
    """
    check_resampling(metric, resamples=resamples, confidence=confidence)
    samples = np.concatenate([metric.score(sums) for sums in resampled_sums([metric.values], resamples, seed)])
    score = metric.corpus_score()
    tails = np.array([(1 - confidence) / 2, (1 + confidence) / 2])
    if method == "bca":
        tails = _bca_tails(metric, samples, score, tails)
    elif method != "percentile":
        raise UserError(f"Unknown interval {method!r}: choose percentile or bca.")
    low, high = (float(end) for end in np.quantile(samples, tails))
    return Interval(score, low, high, confidence)


def check_resampling(*metrics: ClipMetric, resamples: int, confidence: float) -> None:
    """Passes if the numbers are in range and the metrics are of one score and as many clips.

    Raises:
        UserError: They are not, or there is no clip.
    """
    if resamples < 2:
        raise UserError(f"resamples must be at least 2, got {resamples}.")
    if not 0 < confidence < 1:
        raise UserError(f"confidence must lie between 0 and 1, got {confidence}.")
    shapes = [metric.values.shape for metric in metrics]
    if shapes[0][0] == 0:
        raise UserError("There are no clips to resample.")
    if len(set(shapes)) > 1 or len({metric.name for metric in metrics}) > 1:
        told = " and ".join(f"{metric.name} of {len(metric.values)} clips" for metric in metrics)
        raise UserError(f"Runs are compared by one score on the same clips, got {told}.")


def chunk_sizes(resamples: int, clips: int) -> Iterator[int]:
    """How many resamples of so many clips to draw at a time."""
    size = max(1, _CHUNK_ELEMENTS // clips)
    for start in range(0, resamples, size):
        yield min(size, resamples - start)


def resampled_sums(values: Sequence[Floats], resamples: int, seed: int) -> Iterator[Floats]:
    """Sums over resampled clips, the arrays side by side, some resamples at a time; the same clips for the same seed, resamples and N."""
    together = np.concatenate(values, axis=1)
    clips = len(together)
    rng = np.random.default_rng(seed)
    for rows in chunk_sizes(resamples, clips):
        counts = rng.multinomial(clips, np.full(clips, 1 / clips), size=rows).astype(np.float64)
        yield counts @ together


def _bca_tails(metric: ClipMetric, samples: Floats, score: float, tails: Floats) -> Floats:
    """The quantiles that correct for bias (how many resamples lie below the score) and skew (how leaving out a clip moves the score)."""
    normal = NormalDist()
    below = ((samples < score).mean() + (samples <= score).mean()) / 2
    if not 0 < below < 1:
        return tails  # every resample on one side: no correction is defined, as of a score that all clips share
    bias = normal.inv_cdf(float(below))
    left_out = metric.score(metric.values.sum(0) - metric.values)
    deviations = left_out.mean() - left_out
    spread = float((deviations**2).sum() ** 1.5)
    skew = float((deviations**3).sum()) / (6 * spread) if spread > 0 else 0.0
    shifted = [bias + normal.inv_cdf(float(tail)) for tail in tails]
    return np.array([normal.cdf(bias + z / (1 - skew * z)) for z in shifted])
