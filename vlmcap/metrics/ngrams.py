"""Captions as integers, and their n-grams counted by sorting: what BLEU and CIDEr are made of.

An n-gram is a number: that of its first n - 1 tokens times 2^32, plus its last token, looked up in the sorted table of
all n-grams of that order in the references. The place in the table is its id, from which the next order is made.
Nothing is hashed, so nothing can collide.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

Tokens: TypeAlias = Sequence[str]
Ints: TypeAlias = npt.NDArray[np.signedinteger[Any]]

MAX_ORDER = 4

# Two numbers below 2^32 side by side in one of 63 bits: ids stay below 2^31, as no corpus holds more tokens than that.
_SHIFT = 32
_LOW = (1 << _SHIFT) - 1


def closest_length(length: int, reference_lengths: Sequence[int]) -> int:
    """The reference length nearest to `length`; the shorter of two equally near."""
    return min(reference_lengths, key=lambda reference_length: (abs(reference_length - length), reference_length))


class Vocabulary(dict[str, int]):
    """Token to id; a token that was never looked up before gets the next one.

    Args:
        base: Tokens that keep their ids. It is not changed: what is new to it is numbered from its length on.
    """

    def __init__(self, base: dict[str, int] | None = None) -> None:
        super().__init__()
        self._base = base or {}
        self._next = len(self._base)

    def __missing__(self, token: str) -> int:
        index = self._base.get(token)
        if index is None:
            index, self._next = self._next, self._next + 1
        self[token] = index
        return index


@dataclass(frozen=True, slots=True)
class Packed:
    """Captions of token ids, one behind the other.

    Attributes:
        ids: The ids of all tokens, shape (T,).
        start: Where each caption begins, and T at the end, shape (N + 1,).
    """

    ids: Ints
    start: Ints

    @classmethod
    def pack(cls, captions: Sequence[Tokens], vocabulary: Vocabulary) -> Packed:
        """The captions with their tokens looked up in the vocabulary, which learns those that are new."""
        start = offsets(map(len, captions), len(captions))
        # No loop of ours runs per token: fromiter, map and chain meet in C.
        flat = map(vocabulary.__getitem__, chain.from_iterable(captions))
        return cls(np.fromiter(flat, np.int64, int(start[-1])), start)

    @property
    def lengths(self) -> Ints:
        """Tokens of each caption, shape (N,)."""
        return np.diff(self.start)

    def slice(self, first: int, last: int) -> Packed:
        """The captions from number `first` to before `last`."""
        begin, end = self.start[first], self.start[last]
        return Packed(self.ids[begin:end].astype(np.int64), self.start[first : last + 1] - begin)


class Counts(NamedTuple):
    """The n-grams of one order in several captions, sorted by caption and id; each with how often it occurs there."""

    caption: Ints
    ngram: Ints
    times: Ints


def offsets(lengths: Iterable[int], number: int) -> Ints:
    """0 and the running sums of the lengths, shape (number + 1,)."""
    return np.concatenate([[0], np.cumsum(np.fromiter(lengths, np.int64, number))])


def join(high: Ints, low: Ints) -> Ints:
    """One number for each pair of numbers below 2^31, in the order of the pairs."""
    return high << _SHIFT | low


def split(joined: Ints) -> tuple[Ints, Ints]:
    """The two numbers that were joined."""
    return joined >> _SHIFT, joined & _LOW


def is_first(ordered: Ints) -> npt.NDArray[np.bool_]:
    """True where a sorted array begins a new value."""
    first = np.ones(len(ordered), bool)
    np.not_equal(ordered[1:], ordered[:-1], out=first[1:])
    return first


def distinct(values: Ints) -> Ints:
    """The values, sorted, each once.

    Sorts them in place: half the memory and a tenth of the time of `np.unique` with its extras.
    """
    values.sort()
    return values[is_first(values)]


def look_up(table: Ints, values: Ints) -> tuple[Ints, npt.NDArray[np.bool_]]:
    """The place of each value in a sorted table, and whether it is there; quick if the values are sorted too."""
    place = np.searchsorted(table, values)
    if len(table) == 0:
        return place, np.zeros(len(values), bool)
    np.minimum(place, len(table) - 1, out=place)
    return place, table[place] == values


def rank(prefix: Ints, token: Ints) -> tuple[Ints, Ints]:
    """The distinct pairs of prefix and token, joined and sorted, and for each pair its place among them."""
    token_bits, place_bits = _bits(token), len(token).bit_length()
    if _bits(prefix) + token_bits + place_bits < 64:
        # The place of each pair rides along in the lowest bits: sorting numbers is several times faster than sorting
        # places by numbers.
        packed = (prefix << token_bits | token) << place_bits | np.arange(len(token))
        packed.sort()
        order = packed & ((1 << place_bits) - 1)
    else:
        order = np.argsort(join(prefix, token))
    ordered = join(prefix[order], token[order])
    first = is_first(ordered)
    places = np.empty(len(order), np.int64)
    places[order] = np.cumsum(first) - 1
    return ordered[first], places


def _bits(values: Ints) -> int:
    return int(values.max(initial=0)).bit_length()


def number_ngrams(prefix: Ints, token: Ints, table: Ints) -> Ints:
    """The place of each n-gram in the table.

    Those that are not in it get numbers from its length on, equal ones the same.
    """
    once, places = rank(prefix, token)
    place, known = look_up(table, once)
    return np.where(known, place, len(table) + np.arange(len(once)))[places]


def numbered(captions: Packed, number: Callable[[int, Ints, Ints], Ints]) -> Iterator[tuple[Ints, Ints]]:
    """For order 1 to 4 all n-grams in the order of the text: the caption that each is in, and its number.

    Args:
        captions: Token ids, which are the numbers of order 1.
        number: Given an order above 1, the number of each n-gram's first n - 1 tokens, and its last token, returns the
            n-grams' numbers.
    """
    caption = np.repeat(np.arange(len(captions.lengths)), captions.lengths)
    numbers = last = captions.ids
    yield caption, numbers
    for order in range(2, MAX_ORDER + 1):
        # Two neighbours of the order before make one of this, if they are in one caption.
        joined = caption[1:] == caption[:-1]
        caption, last = caption[1:][joined], last[1:][joined]
        numbers = number(order, numbers[:-1][joined], last)
        yield caption, numbers


def count_ngrams(captions: Packed, tables: Sequence[Ints]) -> list[Counts]:
    """How often each n-gram occurs in each caption, for order 1 to 4.

    Args:
        captions: Token ids.
        tables: The sorted keys of the known n-grams of order 2, 3 and 4. What is in none of them is numbered from its
            length on.
    """
    pairs = numbered(captions, lambda order, prefix, last: number_ngrams(prefix, last, tables[order - 2]))
    return [count_pairs(caption, numbers) for caption, numbers in pairs]


def count_pairs(caption: Ints, ngram: Ints) -> Counts:
    """How often each pair of caption and n-gram occurs."""
    pairs = join(caption, ngram)
    pairs.sort()
    start = np.flatnonzero(is_first(pairs))
    once = pairs[start]
    return Counts(*split(once), np.diff(start, append=len(pairs)))
