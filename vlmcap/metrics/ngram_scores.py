"""BLEU and CIDEr from counts of n-grams.

The numbers equal those of COCO's caption evaluation (pycocoevalcap) on the same tokens.

BLEU-1 to BLEU-4 (Papineni et al., "BLEU: a method for automatic evaluation of machine translation", ACL 2002), its
smoothing constants included:

    p_k    = (matches_k + 1e-15) / (ngrams_k + 1e-9)         matches clipped at the largest count in any one reference
    BLEU_n = (p_1 ... p_n)^(1/n) * min(1, exp(1 - 1/ratio))    ratio = (tokens + 1e-15) / (closest reference tokens +
    1e-9)

For the corpus, matches, n-grams and lengths are summed over all captions before the division. A mean of sentence scores
or of batch scores is another number: keep the counts (`vlmcap.metrics.corpus.ClipStatistics`) and add them.

CIDEr, with and without the length penalty (Vedantam et al., "CIDEr", CVPR 2015, arXiv:1411.5726): for each order n =
1..4 a caption c has the vector g_n(c)[w] = count_n(w, c) * (log N - log max(1, df(w))), with N the number of clips and
df(w) the number of those with the n-gram w in any reference. Against its references r_1..r_M a hypothesis h then scores

    CIDEr-D = 10/M * sum_m mean_n [ sum_w min(g_n(h)[w], g_n(r_m)[w]) * g_n(r_m)[w] / (|g_n(h)| |g_n(r_m)|) ] *
    exp(-d_m^2 / (2 sigma^2))

with d_m the difference in length and sigma = 6 tokens: the number that COCO's evaluation prints as "CIDEr". The minimum
("clipping") takes away the gain of repeating a rare word.

`cider` here is the same formula, clipping included, without the exponential. Sigma was set for captions of ten words:
at 210 morphemes an exact prefix of 90 % of the reference misses it by 21 tokens and gets 0.02 of 10. So the two stand
side by side, each under its own name.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import numpy.typing as npt

from vlmcap.metrics.ngrams import MAX_ORDER, Counts, Ints

Floats = npt.NDArray[np.float64]

SIGMA_TOKENS = 6.0

# A numerator that keeps zero matches from zeroing the product exactly, and a denominator that keeps an empty caption
# from a division by zero. Without them scores of short or bad captions would differ from published ones.
_TINY = 1e-15
_SMALL = 1e-9


def bleu_from_counts(matches: Ints, ngrams: Ints, hypothesis_length: Ints, reference_length: Ints) -> Floats:
    """BLEU-1 to BLEU-4 from the counts of single captions, or from their sums over corpora.

    Args:
        matches: Clipped matches of order 1 to 4, shape (..., 4).
        ngrams: n-grams of the hypotheses of order 1 to 4, shape (..., 4).
        hypothesis_length: Tokens of the hypotheses, shape (...).
        reference_length: Tokens of the references nearest in length, shape (...).

    Returns:
        Four scores between 0 and 1 for each entry, shape (..., 4).
    """
    ratio = (np.asarray(hypothesis_length) + _TINY) / (np.asarray(reference_length) + _SMALL)
    brevity = np.exp(1 - 1 / np.minimum(ratio, 1.0))
    product = np.cumprod((np.asarray(matches) + _TINY) / (np.asarray(ngrams) + _SMALL), axis=-1)
    scores: Floats = product ** (1 / np.arange(1, MAX_ORDER + 1)) * brevity[..., None]
    return scores


def ngrams_of_length(length: Ints) -> Ints:
    """How many n-grams of order 1 to 4 captions of so many tokens have, shape (..., 4)."""
    return np.maximum(np.asarray(length)[..., None] - np.arange(MAX_ORDER), 0)


def inverse_frequency(frequency: Ints, clips: int) -> Floats:
    """The weight log N - log max(1, df) of each n-gram; 0 for one that is in every clip.

    Args:
        frequency: In how many clips each n-gram is.
        clips: Number of clips N, at least 1.
    """
    # Logarithms of small whole numbers, looked up: n-grams are many, their frequencies few.
    logs = np.log(np.maximum(1, np.arange(int(frequency.max(initial=0)) + 1)))
    return np.log(clips) - logs[frequency]


def norms(counts: Counts, inverse: Floats, captions: int) -> Floats:
    """The Euclidean norm of each caption's vector of one order, shape (captions,).

    Args:
        counts: The n-grams of the captions.
        inverse: `inverse_frequency` of each entry of `counts`.
        captions: Number of captions.
    """
    return np.sqrt(np.bincount(counts.caption, (counts.times * inverse) ** 2, captions))


def cosine(dot: Floats, norm: Floats, other: Floats) -> Floats:
    """The dot products over the products of the norms; 0 where a norm is."""
    product = norm * other
    return np.divide(dot, product, out=np.zeros_like(dot), where=product > 0)


def scale(cosines: Floats) -> Floats:
    """The score of a pair, from 0 to 10, from the sum of its cosines of order 1 to 4."""
    return cosines * (10 / MAX_ORDER)


def length_penalty(difference: npt.NDArray[Any], *, sigma: float = SIGMA_TOKENS) -> Floats:
    """What CIDEr-D multiplies a pair's score with, above 0 and at most 1, for a difference in length of so many tokens."""
    # The reference implementation measures length in bigrams: the same differences, but for an empty caption, which
    # scores 0 anyhow.
    return np.exp(-np.square(difference.astype(np.float64)) / (2 * sigma**2))


def warn_of_one_clip() -> None:
    """Says why the CIDEr of a corpus of one clip is NaN.

    Every n-gram is in every clip, all weights are 0, and the score says nothing.
    """
    warnings.warn("CIDEr of one clip alone is NaN: it weighs n-grams by how few of the clips have them.", stacklevel=3)
