"""BLEU-1 to BLEU-4 over tokens (Papineni et al., "BLEU: a method for automatic evaluation of machine translation", ACL 2002).

The numbers equal those of COCO's caption evaluation (pycocoevalcap) on the same tokens, its smoothing constants included:

    p_k    = (matches_k + 1e-15) / (ngrams_k + 1e-9)         matches clipped at the largest count in any one reference
    BLEU_n = (p_1 ... p_n)^(1/n) * min(1, exp(1 - 1/ratio))    ratio = (tokens + 1e-15) / (closest reference tokens + 1e-9)

For the corpus, matches, n-grams and lengths are summed over all captions before the division. A mean of sentence scores or of batch
scores is another number: keep the counts (`vlmcap.metrics.corpus.ClipStatistics`) and add them.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from vlmcap.metrics.ngrams import MAX_ORDER, Ints

# A numerator that keeps zero matches from zeroing the product exactly, and a denominator that keeps an empty caption from a division
# by zero. Without them scores of short or bad captions would differ from published ones.
_TINY = 1e-15
_SMALL = 1e-9


def bleu_from_counts(matches: Ints, ngrams: Ints, hypothesis_length: Ints, reference_length: Ints) -> npt.NDArray[np.float64]:
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
    scores: npt.NDArray[np.float64] = product ** (1 / np.arange(1, MAX_ORDER + 1)) * brevity[..., None]
    return scores


def ngrams_of_length(length: Ints) -> Ints:
    """How many n-grams of order 1 to 4 captions of so many tokens have, shape (..., 4)."""
    return np.maximum(np.asarray(length)[..., None] - np.arange(MAX_ORDER), 0)
