"""CIDEr over tokens, with and without the length penalty (Vedantam et al., "CIDEr", CVPR 2015, arXiv:1411.5726).

For each order n = 1..4 a caption c has the vector g_n(c)[w] = count_n(w, c) * (log N - log max(1, df(w))), with N the number of clips and
df(w) the number of those with the n-gram w in any reference. Against its references r_1..r_M a hypothesis h then scores

    CIDEr-D = 10/M * sum_m mean_n [ sum_w min(g_n(h)[w], g_n(r_m)[w]) * g_n(r_m)[w] / (|g_n(h)| |g_n(r_m)|) ] * exp(-d_m^2 / (2 sigma^2))

with d_m the difference in length and sigma = 6 tokens: the number that COCO's evaluation (pycocoevalcap) prints as "CIDEr". The minimum
("clipping") takes away the gain of repeating a rare word.

`cider` here is the same formula, clipping included, without the exponential. Sigma was set for captions of ten words: at 210 morphemes an
exact prefix of 90 % of the reference misses it by 21 tokens and gets 0.02 of 10. So the two stand side by side, each under its own name.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from vlmcap.metrics.ngrams import MAX_ORDER, NGram, Tokens, count_ngrams

_SIGMA_TOKENS = 6.0


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

    The scores of a clip depend on the whole corpus, so a score of batches, averaged, is another number (up to 18 % off): gather first.

    Args:
        hypotheses: The tokens of one prediction a clip.
        references: For each clip the tokens of one or more references.
        sigma: Width of the length penalty in tokens, for CIDEr-D only.

    Returns:
        One pair of scores a clip. Both are NaN, with a warning, for a corpus of one clip: every n-gram of its references is in every
        clip, so all weights are 0 and the score says nothing.
    """
    if len(hypotheses) == 1:
        warnings.warn("CIDEr of one clip alone is NaN: it weighs n-grams by how few of the clips have them.", stacklevel=2)
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


def corpus_cider(hypotheses: Sequence[Tokens], references: Sequence[Sequence[Tokens]], *, sigma: float = _SIGMA_TOKENS) -> CiderScore:
    """CIDEr and CIDEr-D of the corpus: the means over clips of `sentence_cider`."""
    return _mean(sentence_cider(hypotheses, references, sigma=sigma))


def _document_frequencies(counted: list[list[list[Counter[NGram]]]]) -> Counter[NGram]:
    frequencies: Counter[NGram] = Counter()
    for counted_refs in counted:
        # A set: an n-gram counts once a clip, however many of its references have it.
        frequencies.update({ngram for counts in counted_refs for order in counts for ngram in order})
    return frequencies


def _weigh(counts: list[Counter[NGram]], frequencies: Counter[NGram], log_clips: float) -> _Vector:
    weights = [{ngram: count * (log_clips - math.log(max(1, frequencies[ngram]))) for ngram, count in order.items()} for order in counts]
    norms = [math.sqrt(sum(weight**2 for weight in order.values())) for order in weights]
    # The reference implementation measures length in bigrams: the same differences, but for an empty caption, which scores 0 anyhow.
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
