"""ROUGE-L over tokens (Lin, "ROUGE: a package for automatic evaluation of summaries", 2004), as in COCO's evaluation.

    P = LCS / tokens of the hypothesis,  R = LCS / tokens of the reference,  F = (1 + b^2) P R / (R + b^2 P),  b = 1.2

LCS is the length of the longest common subsequence. With several references the largest P and the largest R are used,
even of two different ones. Two empty captions count as equal. Tokens are compared as they are: packages that keep only
ASCII words score identical Korean captions 0.

The LCS is computed one row of its table at a time, with one bit per cell (Hyyrö, "Bit-parallel LCS-length computation
revisited", AWOCA 2004): starting with V = all ones, each token of the hypothesis sets V = (V + (V & M)) | (V & ~M),
where M has a bit at each position of that token in the reference; the LCS is the final number of zeros.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
import numpy.typing as npt

from vlmcap.metrics.ngrams import Ints, Packed, rank

# Weight of recall against precision.
_BETA = 1.2
_WORD_BITS = 64
# A numpy step takes at least a microsecond, so a few long captions are faster with Python's long integers (measured).
_PAIRS_PER_WORD = 40


def f_score(precision: npt.NDArray[np.float64], recall: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Returns the F score of best precision and best recall of each caption, between 0 and 1; 0 without matches."""
    bottom = recall + _BETA**2 * precision
    return np.divide((1 + _BETA**2) * precision * recall, bottom, out=np.zeros_like(bottom), where=bottom > 0)


def lcs_length(first: Sequence[Hashable], second: Sequence[Hashable]) -> int:
    """Returns the length of the longest common subsequence in O(len(first) * len(second) / 30) machine steps."""
    masks: dict[Hashable, int] = {}
    for position, token in enumerate(second):
        masks[token] = masks.get(token, 0) | 1 << position
    full = (1 << len(second)) - 1
    row = full
    for token in first:
        mask = masks.get(token, 0)
        if mask:
            common = row & mask
            row = (row + common | row ^ common) & full
    return len(second) - row.bit_count()


def lcs_lengths(hypotheses: Packed, references: Packed, hypothesis: Ints, reference: Ints) -> Ints:
    """Computes the LCS of many pairs of captions at once.

    Args:
        hypotheses: Token ids of some captions.
        references: Token ids of others, with the same vocabulary.
        hypothesis: Index of the hypothesis of each pair, shape (P,).
        reference: Index of the reference of each pair, shape (P,).

    Returns:
        The length for each pair, shape (P,).
    """
    result = np.zeros(len(hypothesis), np.int64)
    # 64-bit words that hold a bit per token of the reference, rounded up.
    words = -(-references.lengths[reference] // _WORD_BITS)
    words[hypotheses.lengths[hypothesis] == 0] = 0  # their LCS is 0
    for count in np.unique(words[words > 0]):
        pairs = np.flatnonzero(words == count)
        if len(pairs) < _PAIRS_PER_WORD * count:
            result[pairs] = [
                lcs_length(_caption(hypotheses, hypothesis[p]), _caption(references, reference[p])) for p in pairs
            ]
        else:
            # Longest hypotheses first, so that those that still have a token at step t come first.
            pairs = pairs[np.argsort(-hypotheses.lengths[hypothesis[pairs]], kind="stable")]
            result[pairs] = _batched_lcs(hypotheses, references, hypothesis[pairs], reference[pairs], int(count))
    return result


def _caption(captions: Packed, index: int) -> list[int]:
    ids: list[int] = captions.ids[captions.start[index] : captions.start[index + 1]].tolist()
    return ids


def _batched_lcs(hypotheses: Packed, references: Packed, hypothesis: Ints, reference: Ints, words: int) -> Ints:
    """Computes the LCS of pairs ordered by descending hypothesis length, whose references take `words` 64-bit words."""
    masks, row, begin = _place_masks(hypotheses, references, hypothesis, reference, words)
    lengths = hypotheses.lengths[hypothesis]
    active = np.searchsorted(-lengths, -np.arange(lengths[0]))  # number of pairs with a token at each step
    state = np.full((words, len(lengths)), np.iinfo(np.uint64).max, np.uint64)  # V of each pair
    for step, pairs in enumerate(active.tolist()):
        at = row[begin[:pairs] + step]  # M of the token of each pair
        carry = np.uint64(0)
        for word in range(words):
            old = state[word, :pairs]
            common = old & masks[word][at]
            new = old + common
            if word:
                new += carry
            if word + 1 < words:  # the addition carries into the next word
                carry = (common | (old & ~new)) >> np.uint64(_WORD_BITS - 1)
            # old ^ common is V & ~M.
            state[word, :pairs] = new | (old ^ common)
    # Bits behind the reference's end stay ones, as no mask has a bit there.
    return np.bitwise_count(~state).sum(axis=0, dtype=np.int64)


def _place_masks(
    hypotheses: Packed, references: Packed, hypothesis: Ints, reference: Ints, words: int
) -> tuple[npt.NDArray[np.uint64], Ints, Ints]:
    """Builds a bit mask of positions in the reference for each (pair, token).

    Returns:
        The masks, shape (words, rows); the row of each token of each hypothesis, concatenated over pairs; and the start
        of each pair in that.
    """
    predicted, predicted_pair, position = _gather(hypotheses, hypothesis)
    true, true_pair, where = _gather(references, reference)
    table, row = rank(np.concatenate([predicted_pair, true_pair]), np.concatenate([predicted, true]))
    masks = np.zeros(words * len(table), np.uint64)
    # A sum equals the union here, since no two tokens share both a mask and a position.
    np.add.at(
        masks,
        row[len(predicted) :] + where // _WORD_BITS * len(table),
        np.uint64(1) << (where % _WORD_BITS).astype(np.uint64),
    )
    return masks.reshape(words, -1), row[: len(predicted)], np.flatnonzero(position == 0)


def _gather(captions: Packed, which: Ints) -> tuple[Ints, Ints, Ints]:
    """Returns the tokens of the selected captions, the index in `which` of each, and its position there."""
    lengths = captions.lengths[which]
    owner = np.repeat(np.arange(len(which)), lengths)
    position = np.arange(len(owner)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    return captions.ids[captions.start[which][owner] + position], owner, position
