"""BLEU and CIDEr from counts of n-grams.

Scores equal those of COCO's caption evaluation (pycocoevalcap) on the same tokens.

BLEU-1 to BLEU-4 (Papineni et al., "BLEU: a method for automatic evaluation of machine translation", ACL 2002),
including its smoothing constants:

    p_k    = (matches_k + 1e-15) / (ngrams_k + 1e-9)         matches clipped at the largest count in any one reference
    BLEU_n = (p_1 ... p_n)^(1/n) * min(1, exp(1 - 1/ratio))
    ratio  = (tokens + 1e-15) / (closest reference tokens + 1e-9)

For the corpus, matches, n-grams and lengths are summed over all captions before the division. A mean of sentence scores
or of batch scores differs from it: keep the counts (`vlmcap.metrics.corpus.ClipStatistics`) and add them.

CIDEr, with and without the length penalty (Vedantam et al., "CIDEr", CVPR 2015, arXiv:1411.5726): for each order n =
1..4 a caption c has the vector g_n(c)[w] = count_n(w, c) * (log N - log max(1, df(w))), with N the number of clips and
df(w) the number of those with the n-gram w in any reference. Against its references r_1..r_M a hypothesis h then scores

    CIDEr-D = 10/M * sum_m mean_n [ sum_w min(g_n(h)[w], g_n(r_m)[w]) * g_n(r_m)[w] / (|g_n(h)| |g_n(r_m)|) ]
              * exp(-d_m^2 / (2 sigma^2))

with d_m the difference in length and sigma = 6 tokens: the score that COCO's evaluation prints as "CIDEr". The minimum
("clipping") removes the gain of repeating a rare word.

`cider` is the same formula, clipping included, without the exponential. Sigma was chosen for captions of ten words: at
210 morphemes an exact prefix of 90 % of the reference misses it by 21 tokens and gets 0.02 of 10. So both are reported,
each under its own name.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import numpy.typing as npt

from vlmcap.metrics.ngrams import MAX_ORDER, Counts, Ints

Floats = npt.NDArray[np.float64]

# Width of CIDEr-D's Gaussian penalty, as in the reference implementation.
SIGMA_TOKENS = 6.0

# A numerator that keeps zero matches from making the product exactly zero, and a denominator that avoids a division by
# zero for an empty caption. Without them scores of short or bad captions would differ from published ones.
_TINY = 1e-15
_SMALL = 1e-9


def bleu_from_counts(matches: Ints, ngrams: Ints, hypothesis_length: Ints, reference_length: Ints) -> Floats:
    """Computes BLEU-1 to BLEU-4 from the counts of single captions, or from their sums over corpora.

    Args:
        matches: Clipped matches of order 1 to 4, shape (..., 4).
        ngrams: Number of n-grams of the hypotheses of order 1 to 4, shape (..., 4).
        hypothesis_length: Number of tokens of the hypotheses, shape (...).
        reference_length: Number of tokens of the references nearest in length, shape (...).

    Returns:
        Four scores between 0 and 1 for each entry, shape (..., 4).
    """
    ratio = (np.asarray(hypothesis_length) + _TINY) / (np.asarray(reference_length) + _SMALL)
    brevity = np.exp(1 - 1 / np.minimum(ratio, 1.0))
    # (..., 4): products of the precisions up to each order
    product = np.cumprod((np.asarray(matches) + _TINY) / (np.asarray(ngrams) + _SMALL), axis=-1)
    # geometric mean of orders 1 to n
    scores: Floats = product ** (1 / np.arange(1, MAX_ORDER + 1)) * brevity[..., None]
    return scores


def ngrams_of_length(length: Ints) -> Ints:
    """Returns the number of n-grams of order 1 to 4 in captions of the given numbers of tokens, shape (..., 4)."""
    return np.maximum(np.asarray(length)[..., None] - np.arange(MAX_ORDER), 0)


def inverse_frequency(frequency: Ints, clips: int) -> Floats:
    """Returns the weight log N - log max(1, df) of each n-gram; 0 for one that is in every clip.

    Args:
        frequency: Number of clips that contain each n-gram.
        clips: Number of clips N, at least 1.
    """
    # Logarithms of small integers are looked up: there are many n-grams, but few different frequencies.
    logs = np.log(np.maximum(1, np.arange(int(frequency.max(initial=0)) + 1)))
    return np.log(clips) - logs[frequency]


def norms(counts: Counts, inverse: Floats, captions: int) -> Floats:
    """Returns the Euclidean norm of each caption's vector of one order, shape (captions,).

    Args:
        counts: n-grams of the captions.
        inverse: `inverse_frequency` of each entry of `counts`.
        captions: Number of captions.
    """
    return np.sqrt(np.bincount(counts.caption, (counts.times * inverse) ** 2, captions))


def cosine(dot: Floats, norm: Floats, other: Floats) -> Floats:
    """Returns the dot products over the products of the norms; 0 where a norm is 0."""
    product = norm * other
    return np.divide(dot, product, out=np.zeros_like(dot), where=product > 0)


def scale(cosines: Floats) -> Floats:
    """Returns the score of a pair, from 0 to 10, from the sum of its cosines of order 1 to 4."""
    # The mean over orders, times 10 as in the reference implementation.
    return cosines * (10 / MAX_ORDER)


def length_penalty(difference: npt.NDArray[Any]) -> Floats:
    """Returns CIDEr-D's factor for a difference in length in tokens, above 0 and at most 1."""
    # The reference implementation measures length in bigrams: the same differences except for an empty caption, which
    # scores 0 anyway.
    return np.exp(-np.square(difference.astype(np.float64)) / (2 * SIGMA_TOKENS**2))


def warn_of_one_clip() -> None:
    """Warns that the CIDEr of a corpus of one clip is NaN: every n-gram is in every clip, so all weights are 0."""
    warnings.warn(
        "CIDEr of a single clip is NaN, because it weights n-grams by how few clips contain them; score more clips.",
        stacklevel=3,
    )
