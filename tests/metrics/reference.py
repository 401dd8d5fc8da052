"""BLEU, CIDEr and ROUGE-L as their papers write them.

Plain Python, one caption after the other, to read and to compare the fast code with.

Formulas and sources stand in `vlmcap.metrics.ngram_scores`, `.cider` and `.rouge`.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from vlmcap.metrics.ngrams import MAX_ORDER, Tokens, closest_length

NGram: TypeAlias = tuple[str, ...]

# A numerator that keeps zero matches from zeroing the product exactly, and a denominator that keeps an empty caption
# from a division by zero. Without them scores of short or bad captions would differ from published ones.
_TINY = 1e-15
_SMALL = 1e-9


_SIGMA_TOKENS = 6.0
_BETA = 1.2


def count_ngrams(tokens: Tokens, max_order: int = MAX_ORDER) -> list[Counter[NGram]]:
    """How often each n-gram occurs in the tokens, one counter an order.

    Args:
        tokens: The tokens of one caption.
        max_order: The longest n-gram, at least 1.

    Returns:
        `max_order` counters: the first holds single tokens, the last n-grams of `max_order` tokens.
    """
    return [
        Counter(zip(*(tokens[start:] for start in range(order)), strict=False)) for order in range(1, max_order + 1)
    ]


@dataclass(frozen=True, slots=True)
class BleuStatistics:
    """The counts that BLEU of one caption, or of a whole corpus, is computed from.

    Attributes:
        matches: Clipped matches of order 1 to 4.
        ngrams: n-grams of the hypothesis of order 1 to 4.
        hypothesis_length: Tokens of the hypothesis.
        reference_length: Tokens of the reference nearest in length.
    """

    matches: tuple[int, ...] = (0,) * MAX_ORDER
    ngrams: tuple[int, ...] = (0,) * MAX_ORDER
    hypothesis_length: int = 0
    reference_length: int = 0

    def __add__(self, other: BleuStatistics) -> BleuStatistics:
        """The statistics of both sets of captions together."""
        return BleuStatistics(
            tuple(a + b for a, b in zip(self.matches, other.matches, strict=True)),
            tuple(a + b for a, b in zip(self.ngrams, other.ngrams, strict=True)),
            self.hypothesis_length + other.hypothesis_length,
            self.reference_length + other.reference_length,
        )


def bleu_statistics(hypothesis: Tokens, references: Sequence[Tokens]) -> BleuStatistics:
    """The counts of one caption against its references, of which there is at least one."""
    reference_counts = [count_ngrams(reference) for reference in references]
    matches = []
    for order, counts in enumerate(count_ngrams(hypothesis)):
        matches.append(
            sum(min(count, max(r[order][ngram] for r in reference_counts)) for ngram, count in counts.items())
        )
    return BleuStatistics(
        tuple(matches),
        tuple(max(0, len(hypothesis) - order) for order in range(MAX_ORDER)),
        len(hypothesis),
        closest_length(len(hypothesis), [len(reference) for reference in references]),
    )


def bleu_from_statistics(statistics: BleuStatistics) -> list[float]:
    """BLEU-1 to BLEU-4, each between 0 and 1, from the counts of one caption or the sum over a corpus."""
    ratio = (statistics.hypothesis_length + _TINY) / (statistics.reference_length + _SMALL)
    brevity = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    scores, product = [], 1.0
    for order, (matches, ngrams) in enumerate(zip(statistics.matches, statistics.ngrams, strict=True), start=1):
        product *= (matches + _TINY) / (ngrams + _SMALL)
        scores.append(product ** (1 / order) * brevity)
    return scores


def corpus_bleu(hypotheses: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> list[float]:
    """BLEU-1 to BLEU-4 of the whole corpus, each between 0 and 1.

    Args:
        hypotheses: The tokens of one prediction a clip.
        references: For each clip the tokens of one or more references.

    Returns:
        Four scores.
    """
    pairs = zip(hypotheses, references, strict=True)
    return bleu_from_statistics(
        sum((bleu_statistics(hypothesis, refs) for hypothesis, refs in pairs), BleuStatistics())
    )


def sentence_bleu(hypotheses: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> list[list[float]]:
    """BLEU-1 to BLEU-4 of each clip by itself; their mean is not the corpus score."""
    pairs = zip(hypotheses, references, strict=True)
    return [bleu_from_statistics(bleu_statistics(hypothesis, refs)) for hypothesis, refs in pairs]


class CiderScore(NamedTuple):
    """The two CIDEr scores of one clip or of a corpus, each from 0 to 10.

    Attributes:
        cider: Without the length penalty.
        cider_d: With it, as in COCO's evaluation.
    """

    cider: float
    cider_d: float


@dataclass(frozen=True, slots=True)
class _Vector:
    """A caption as tf-idf weights: a mapping, and its Euclidean norm, for each order."""

    weights: list[dict[NGram, float]]
    norms: list[float]
    length: int


def sentence_cider(
    hypotheses: Sequence[Tokens], references: Sequence[Sequence[Tokens]], *, sigma: float = _SIGMA_TOKENS
) -> list[CiderScore]:
    """CIDEr and CIDEr-D of each clip, with document frequencies over all the references given.

    The scores of a clip depend on the whole corpus, so a score of batches, averaged, is another number (up to 18 %
    off): gather first.

    Args:
        hypotheses: The tokens of one prediction a clip.
        references: For each clip the tokens of one or more references.
        sigma: Width of the length penalty in tokens, for CIDEr-D only.

    Returns:
        One pair of scores a clip. Both are NaN, with a warning, for a corpus of one clip: every n-gram of its
        references is in every clip, so all weights are 0 and the score says nothing.
    """
    if len(hypotheses) == 1:
        warnings.warn(
            "CIDEr of one clip alone is NaN: it weighs n-grams by how few of the clips have them.", stacklevel=2
        )
        return [CiderScore(math.nan, math.nan)]
    counted = [[count_ngrams(reference) for reference in refs] for refs in references]
    frequencies = _document_frequencies(counted)
    log_clips = math.log(len(counted))
    scores = []
    for hypothesis, counted_refs in zip(hypotheses, counted, strict=True):
        vector = _weigh(count_ngrams(hypothesis), frequencies, log_clips)
        pairs = [_similarity(vector, _weigh(counts, frequencies, log_clips), sigma) for counts in counted_refs]
        scores.append(_mean(pairs))
    return scores


def corpus_cider(
    hypotheses: Sequence[Tokens], references: Sequence[Sequence[Tokens]], *, sigma: float = _SIGMA_TOKENS
) -> CiderScore:
    """CIDEr and CIDEr-D of the corpus: the means over clips of `sentence_cider`."""
    return _mean(sentence_cider(hypotheses, references, sigma=sigma))


def _document_frequencies(counted: list[list[list[Counter[NGram]]]]) -> Counter[NGram]:
    frequencies: Counter[NGram] = Counter()
    for counted_refs in counted:
        # A set: an n-gram counts once a clip, however many of its references have it.
        frequencies.update({ngram for counts in counted_refs for order in counts for ngram in order})
    return frequencies


def _weigh(counts: list[Counter[NGram]], frequencies: Counter[NGram], log_clips: float) -> _Vector:
    weights = [
        {ngram: count * (log_clips - math.log(max(1, frequencies[ngram]))) for ngram, count in order.items()}
        for order in counts
    ]
    norms = [math.sqrt(sum(weight**2 for weight in order.values())) for order in weights]
    # The reference implementation measures length in bigrams: the same differences, but for an empty caption, which
    # scores 0 anyhow.
    return _Vector(weights, norms, counts[0].total())


def _similarity(hypothesis: _Vector, reference: _Vector, sigma: float) -> CiderScore:
    """The clipped cosine of two captions, mean over orders, times 10; without and with the penalty."""
    total = 0.0
    for order in range(MAX_ORDER):
        norm = hypothesis.norms[order] * reference.norms[order]
        if norm > 0:
            in_reference = reference.weights[order]
            dot = sum(
                min(weight, in_reference[ngram]) * in_reference[ngram]
                for ngram, weight in hypothesis.weights[order].items()
                if ngram in in_reference
            )
            total += dot / norm
    cider = 10 * total / MAX_ORDER
    return CiderScore(cider, cider * math.exp(-((hypothesis.length - reference.length) ** 2) / (2 * sigma**2)))


def _mean(scores: Sequence[CiderScore]) -> CiderScore:
    return CiderScore(sum(s.cider for s in scores) / len(scores), sum(s.cider_d for s in scores) / len(scores))


def lcs_length(first: Tokens, second: Tokens) -> int:
    """The length of the longest common subsequence of two token sequences, in O(len(first) * len(second))."""
    if len(first) < len(second):
        first, second = second, first
    row = [0] * (len(second) + 1)
    for token in first:
        diagonal = 0
        for column, other in enumerate(second, start=1):
            above = row[column]
            row[column] = diagonal + 1 if token == other else max(above, row[column - 1])
            diagonal = above
    return row[-1]


def rouge_l(hypothesis: Tokens, references: Sequence[Tokens], *, beta: float = _BETA) -> float:
    """ROUGE-L of one caption, between 0 and 1.

    Args:
        hypothesis: The tokens of the prediction.
        references: The tokens of one or more references.
        beta: How much more recall weighs than precision.

    Returns:
        The F score of the best precision and the best recall.
    """
    # An empty caption is one empty token in the reference implementation; this also keeps both divisions defined.
    hypothesis = hypothesis or [""]
    precision = recall = 0.0
    for reference in (reference or [""] for reference in references):
        common = lcs_length(hypothesis, reference)
        precision = max(precision, common / len(hypothesis))
        recall = max(recall, common / len(reference))
    if precision == 0:
        return 0.0
    return (1 + beta**2) * precision * recall / (recall + beta**2 * precision)


def sentence_rouge_l(
    hypotheses: Sequence[Tokens], references: Sequence[Sequence[Tokens]], *, beta: float = _BETA
) -> list[float]:
    """ROUGE-L of each clip, between 0 and 1."""
    return [rouge_l(hypothesis, refs, beta=beta) for hypothesis, refs in zip(hypotheses, references, strict=True)]


def corpus_rouge_l(
    hypotheses: Sequence[Tokens], references: Sequence[Sequence[Tokens]], *, beta: float = _BETA
) -> float:
    """The mean ROUGE-L over clips, between 0 and 1."""
    return sum(sentence_rouge_l(hypotheses, references, beta=beta)) / len(hypotheses)
