"""Counting n-grams: what BLEU and CIDEr are made of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TypeAlias

Tokens: TypeAlias = Sequence[str]
NGram: TypeAlias = tuple[str, ...]

MAX_ORDER = 4


def count_ngrams(tokens: Tokens, max_order: int = MAX_ORDER) -> list[Counter[NGram]]:
    """How often each n-gram occurs in the tokens, one counter an order.

    Args:
        tokens: The tokens of one caption.
        max_order: The longest n-gram, at least 1.

    Returns:
        `max_order` counters: the first holds single tokens, the last n-grams of `max_order` tokens.
    """
    return [Counter(zip(*(tokens[start:] for start in range(order)), strict=False)) for order in range(1, max_order + 1)]


def closest_length(length: int, reference_lengths: Sequence[int]) -> int:
    """The reference length nearest to `length`; the shorter of two equally near."""
    return min(reference_lengths, key=lambda reference_length: (abs(reference_length - length), reference_length))
