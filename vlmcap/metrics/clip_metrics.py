"""Scores as functions of numbers summed over clips: what resampling and categories need of a score, and no more."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vlmcap.errors import UserError
from vlmcap.metrics.bleu import bleu_from_counts
from vlmcap.metrics.content import content_from_counts
from vlmcap.metrics.corpus import ClipStatistics, corpus_scores
from vlmcap.metrics.meteor import MeteorStatistics, meteor_from_statistics

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class ClipMetric:
    """One score of N clips.

    Attributes:
        name: Such as "cider"; runs are compared by metrics of one name.
        values: What is summed over clips, shape (N, K).
        score: Sums of shape (..., K) to scores of shape (...).
    """

    name: str
    values: Floats
    score: Callable[[Floats], Floats]

    def corpus_score(self) -> float:
        """The score of all clips."""
        return float(self.score(self.values.sum(0)))


def mean_metric(name: str, values: npt.ArrayLike) -> ClipMetric:
    """The mean of one number a clip, shape (N,): ROUGE-L, CIDEr, BERTScore, whether a fact was right, or any other.

    Raises:
        UserError: The values are not one number a clip.
    """
    array = np.asarray(values, np.float64)
    if array.ndim != 1:
        raise UserError(f"{name} must be one number a clip, got an array of shape {array.shape}.")
    return ClipMetric(name, np.stack([array, np.ones_like(array)], axis=1), _mean)


def clip_metrics(statistics: ClipStatistics) -> dict[str, ClipMetric]:
    """`bleu_1` to `bleu_4` of the corpus, `cider`, `cider_d` and `rouge_l` from the statistics of `vlmcap.metrics.corpus`."""
    s = statistics
    counts = np.column_stack([s.matches, s.ngrams, s.hypothesis_length, s.reference_length]).astype(np.float64)
    metrics = {f"bleu_{order}": ClipMetric(f"bleu_{order}", counts, _bleu(order)) for order in range(1, 5)}
    return metrics | {name: mean_metric(name, getattr(s, name)) for name in ("cider", "cider_d", "rouge_l")}


def meteor_metric(statistics: Sequence[MeteorStatistics], name: str = "meteor") -> ClipMetric:
    """Corpus METEOR from the counts of each clip; `name` is "meteor_ko" for those of `meteor_ko_statistics`."""
    rows = [[s.matches, s.chunks, s.matched_weight, s.hypothesis_weight, s.reference_weight] for s in statistics]
    return ClipMetric(name, np.array(rows, np.float64).reshape(-1, 5), _meteor)


def content_metric(counts: npt.NDArray[np.int64], name: str = "content_f1") -> ClipMetric:
    """A score of `content_scores` from the counts of `content_counts`, shape (N, 6, 3).

    Raises:
        UserError: There is no such score.
    """
    known = content_from_counts(np.zeros(counts.shape[1:], np.int64))
    if name not in known:
        raise UserError(f"Unknown content score {name!r}: choose one of {', '.join(known)}.")

    def score(sums: Floats) -> Floats:
        tables = np.rint(sums).astype(np.int64).reshape(-1, *counts.shape[1:])
        return np.array([content_from_counts(table)[name] for table in tables]).reshape(sums.shape[:-1])

    return ClipMetric(name, counts.reshape(len(counts), -1).astype(np.float64), score)


def fact_metric(counts: npt.NDArray[np.int64], name: str = "facts/mean") -> ClipMetric:
    """Fact accuracy from the `fact_counts` of one fact, shape (N, 1, 2), or the mean over facts, from those of all, shape (N, facts, 2)."""

    def score(sums: Floats) -> Floats:
        right, stated = np.moveaxis(sums.reshape(*sums.shape[:-1], -1, 2), -1, 0)
        accuracy = np.where(stated > 0, right / np.maximum(stated, 1), 0.0)
        number = (stated > 0).sum(-1)  # a fact that no clip states is not counted, as in `fact_accuracy`
        return np.where(number > 0, accuracy.sum(-1) / np.maximum(number, 1), np.nan)

    return ClipMetric(name, counts.reshape(len(counts), -1).astype(np.float64), score)


def by_category(statistics: ClipStatistics, categories: Sequence[Hashable]) -> dict[Hashable, dict[str, float]]:
    """The corpus scores of the clips of each category, with their number as `clips`.

    CIDEr keeps the document frequencies of the whole reference corpus, so a category of one clip has one as well.

    Args:
        statistics: Of all clips.
        categories: One label a clip, such as "sea" or 3; None is a label like any other.

    Returns:
        Category to scores, in the order in which the categories first occur.

    Raises:
        UserError: The numbers of labels and clips differ.
    """
    if len(categories) != len(statistics.rouge_l):
        raise UserError(f"There are {len(categories)} categories for {len(statistics.rouge_l)} clips: give each clip one.")
    rows: dict[Hashable, list[int]] = {}
    for index, category in enumerate(categories):
        rows.setdefault(category, []).append(index)
    return {category: corpus_scores(statistics.take(found)) | {"clips": float(len(found))} for category, found in rows.items()}


def _mean(sums: Floats) -> Floats:
    # The number of clips is summed with the values: left-out and resampled clips are then counted right.
    with np.errstate(invalid="ignore"):
        return sums[..., 0] / sums[..., 1]


def _meteor(sums: Floats) -> Floats:
    rows = sums.reshape(-1, 5).tolist()
    scores = [meteor_from_statistics(MeteorStatistics(round(row[0]), round(row[1]), *row[2:])) for row in rows]
    return np.array(scores).reshape(sums.shape[:-1])


def _bleu(order: int) -> Callable[[Floats], Floats]:
    def score(sums: Floats) -> Floats:
        counts = np.rint(sums).astype(np.int64)  # whole numbers in floating point
        return bleu_from_counts(counts[..., :4], counts[..., 4:8], counts[..., 8], counts[..., 9])[..., order - 1]

    return score
