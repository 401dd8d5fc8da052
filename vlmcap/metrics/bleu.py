"""BLEU-1 to BLEU-4 over tokens (Papineni et al., "BLEU: a method for automatic evaluation of machine translation", ACL 2002).

The numbers equal those of COCO's caption evaluation (pycocoevalcap) on the same tokens, its smoothing constants included:

    p_k    = (matches_k + 1e-15) / (ngrams_k + 1e-9)         matches clipped at the largest count in any one reference
    BLEU_n = (p_1 ... p_n)^(1/n) * min(1, exp(1 - 1/ratio))    ratio = (tokens + 1e-15) / (closest reference tokens + 1e-9)

For the corpus, matches, n-grams and lengths are summed over all captions before the division. A mean of sentence scores or of batch
scores is another number: keep the `BleuStatistics` and add them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from vlmcap.metrics.ngrams import MAX_ORDER, Tokens, closest_length, count_ngrams

# A numerator that keeps zero matches from zeroing the product exactly, and a denominator that keeps an empty caption from a division
# by zero. Without them scores of short or bad captions would differ from published ones.
_TINY = 1e-15
_SMALL = 1e-9


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
        matches.append(sum(min(count, max(r[order][ngram] for r in reference_counts)) for ngram, count in counts.items()))
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
    return bleu_from_statistics(sum((bleu_statistics(hypothesis, refs) for hypothesis, refs in pairs), BleuStatistics()))


def sentence_bleu(hypotheses: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> list[list[float]]:
    """BLEU-1 to BLEU-4 of each clip by itself; their mean is not the corpus score."""
    pairs = zip(hypotheses, references, strict=True)
    return [bleu_from_statistics(bleu_statistics(hypothesis, refs)) for hypothesis, refs in pairs]
