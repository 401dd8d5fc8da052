"""Scores as functions of numbers summed over clips, which is all that resampling needs.

`clip_scores` computes them from texts by the name of the score, for comparing runs by their captions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from vlmcap.errors import UserError
from vlmcap.metrics.content import Synonyms, content_counts, content_from_counts
from vlmcap.metrics.corpus import ClipStatistics, clip_statistics
from vlmcap.metrics.facts import FactLexicon, fact_counts
from vlmcap.metrics.meteor import MeteorStatistics, meteor_from_statistics, meteor_ko_statistics, meteor_statistics
from vlmcap.metrics.ngram_scores import bleu_from_counts
from vlmcap.metrics.scores import count_references, tokenize_captions
from vlmcap.metrics.tokenizers import Tokenizer

Floats = npt.NDArray[np.float64]

COUNTED = ("bleu_1", "bleu_2", "bleu_3", "bleu_4", "cider", "cider_d", "rouge_l")
"""Scores that are computed together in one pass over the captions."""


@dataclass(frozen=True, slots=True, eq=False)
class ClipMetric:
    """One score of N clips.

    Attributes:
        name: Name of the score, such as "cider"; only metrics of the same name are compared.
        values: (N, K) values that are summed over clips.
        score: Function from sums of shape (..., K) to scores of shape (...).
    """

    name: str
    values: Floats
    score: Callable[[Floats], Floats]

    def corpus_score(self) -> float:
        """Returns the score of all clips."""
        return float(self.score(self.values.sum(0)))


def mean_metric(name: str, values: npt.ArrayLike) -> ClipMetric:
    """Builds the mean of one number per clip, shape (N,): ROUGE-L, CIDEr, BERTScore, correctness of a fact, or others.

    Raises:
        UserError: The values are not one number per clip.
    """
    array = np.asarray(values, np.float64)
    if array.ndim != 1:
        raise UserError(f"{name} must be one number per clip, not an array of shape {array.shape}.")
    return ClipMetric(name, np.stack([array, np.ones_like(array)], axis=1), _mean)  # (N, 2): value and 1


def clip_metrics(statistics: ClipStatistics) -> dict[str, ClipMetric]:
    """Builds `bleu_1` to `bleu_4` of the corpus, `cider`, `cider_d` and `rouge_l` from clip statistics."""
    s = statistics
    # (N, 10): four columns of matches, four of n-grams, and the two lengths; `_bleu` takes them apart.
    counts = np.column_stack([s.matches, s.ngrams, s.hypothesis_length, s.reference_length]).astype(np.float64)
    metrics = {f"bleu_{order}": ClipMetric(f"bleu_{order}", counts, _bleu(order)) for order in range(1, 5)}
    return metrics | {name: mean_metric(name, getattr(s, name)) for name in ("cider", "cider_d", "rouge_l")}


def meteor_metric(statistics: Sequence[MeteorStatistics], name: str = "meteor") -> ClipMetric:
    """Builds corpus METEOR from counts of each clip; `name` is "meteor_ko" for those of `meteor_ko_statistics`."""
    counts = [[s.matches, s.chunks, s.matched_weight, s.hypothesis_weight, s.reference_weight] for s in statistics]
    return ClipMetric(name, np.array(counts, np.float64).reshape(-1, 5), _meteor)  # (N, 5), also for N = 0


def content_metric(counts: npt.NDArray[np.int64], name: str = "content_f1") -> ClipMetric:
    """Builds a score of `content_scores` from the counts of `content_counts`, shape (N, 6, 3).

    Raises:
        UserError: There is no such score.
    """
    known = content_from_counts(np.zeros(counts.shape[1:], np.int64))
    if name not in known:
        raise UserError(f"Unknown content score {name!r}; choose one of {', '.join(known)}.")

    def score(sums: Floats) -> Floats:
        tables = np.rint(sums).astype(np.int64).reshape(-1, *counts.shape[1:])  # (..., 18) -> (R, 6, 3)
        return np.array([content_from_counts(table)[name] for table in tables]).reshape(sums.shape[:-1])

    return ClipMetric(name, counts.reshape(len(counts), -1).astype(np.float64), score)


def fact_metric(counts: npt.NDArray[np.int64], name: str = "facts/mean") -> ClipMetric:
    """Builds fact accuracy from `fact_counts`.

    Args:
        counts: (N, 1, 2) for one fact, or (N, facts, 2) for the mean over all facts.
        name: Name of the metric.
    """

    def score(sums: Floats) -> Floats:
        right, stated = np.moveaxis(sums.reshape(*sums.shape[:-1], -1, 2), -1, 0)  # (..., 2 facts) -> two (..., facts)
        accuracy = np.where(stated > 0, right / np.maximum(stated, 1), 0.0)
        number = (stated > 0).sum(-1)  # facts that no clip states are not counted, as in `fact_accuracy`
        return np.where(number > 0, accuracy.sum(-1) / np.maximum(number, 1), np.nan)

    return ClipMetric(name, counts.reshape(len(counts), -1).astype(np.float64), score)


def is_clip_score(name: str) -> bool:
    """Returns whether `clip_scores` supports the name; other scores need the whole corpus or pretrained models."""
    return name in COUNTED or name in ("meteor", "meteor_ko") or name.startswith(("content_", "content/", "facts/"))


def clip_scores(
    name: str,
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    tokenizer: Tokenizer,
    synonyms: Synonyms | str | Path | None = None,
    lexicon: FactLexicon | None = None,
) -> dict[str, ClipMetric]:
    """Computes the named score, together with those that come at no extra cost.

    Args:
        name: A name from `score_captions`, `content/noun_recall`, `facts/mean` or `facts/<fact>`.
        predictions: One text per clip.
        references: One or more texts per clip.
        tokenizer: Tokenizer for BLEU, CIDEr, ROUGE-L and METEOR.
        synonyms: Synonyms for content words.
        lexicon: Lexicon for facts, which defines their names.

    Raises:
        UserError: There is no such score of clips, or as in `score_captions`.
    """
    if name in COUNTED:
        corpus = count_references(references, tokenizer)
        return clip_metrics(clip_statistics(tokenize_captions(predictions, tokenizer), corpus))
    if name == "meteor":
        tokens, known = tokenize_captions(predictions, tokenizer), count_references(references, tokenizer).tokens()
        pairs = zip(tokens, known, strict=True)
        return {name: meteor_metric([meteor_statistics(hypothesis, refs) for hypothesis, refs in pairs])}
    if name == "meteor_ko":
        return {name: meteor_metric(meteor_ko_statistics(predictions, references), name)}
    if name.startswith(("content_", "content/")):
        return {name: content_metric(content_counts(predictions, references, synonyms), name)}
    if name.startswith("facts/") and lexicon is not None:
        return _facts(name, predictions, references, lexicon)
    raise UserError(
        f"{name} is not a score of clips; choose one of {', '.join(COUNTED)}, meteor, meteor_ko, content_f1 and "
        "facts/mean"
    )


def _facts(
    name: str, predictions: Sequence[str], references: Sequence[Sequence[str]], lexicon: FactLexicon
) -> dict[str, ClipMetric]:
    counts = fact_counts(predictions, references, lexicon)
    metrics = {
        f"facts/{fact}": fact_metric(counts[:, [index]], f"facts/{fact}") for index, fact in enumerate(lexicon.phrases)
    }
    metrics["facts/mean"] = fact_metric(counts)
    if name not in metrics:
        raise UserError(
            f"there is no fact {name.removeprefix('facts/')}; choose one of {', '.join(lexicon.phrases)}, mean"
        )
    return metrics


def _mean(sums: Floats) -> Floats:
    # The number of clips is summed with the values, so that resampled clips are counted correctly.
    with np.errstate(invalid="ignore"):
        return sums[..., 0] / sums[..., 1]


def _meteor(sums: Floats) -> Floats:
    rows = sums.reshape(-1, 5).tolist()
    # The first two columns are counts; the weights stay fractions.
    scores = [meteor_from_statistics(MeteorStatistics(round(row[0]), round(row[1]), *row[2:])) for row in rows]
    return np.array(scores).reshape(sums.shape[:-1])


def _bleu(order: int) -> Callable[[Floats], Floats]:
    def score(sums: Floats) -> Floats:
        counts = np.rint(sums).astype(np.int64)  # sums are integers in floating point
        return bleu_from_counts(counts[..., :4], counts[..., 4:8], counts[..., 8], counts[..., 9])[..., order - 1]

    return score
