"""References as integers, their n-grams counted once: the part of the scores that stays the same from epoch to epoch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import numpy.typing as npt

from vlmcap.errors import UserError
from vlmcap.metrics.cider import inverse_frequency, norms
from vlmcap.metrics.ngrams import (
    Counts,
    Ints,
    Packed,
    Tokens,
    Vocabulary,
    count_pairs,
    distinct,
    join,
    numbered,
    offsets,
    rank,
    split,
)

Floats = npt.NDArray[np.float64]

# Tokens counted at a time: arrays of this length sort in the processor's cache, twice as fast as in memory.
CHUNK_TOKENS = 1 << 17


@dataclass(frozen=True, slots=True)
class OrderCounts:
    """The n-grams of one order in all references; R captions, G distinct n-grams, E entries sorted by caption and n-gram.

    Attributes:
        keys: What names each n-gram, sorted, shape (G,); empty for order 1, where the token's id does.
        frequency: In how many clips each n-gram is, shape (G,).
        start: Where each caption's entries begin, and E, shape (R + 1,).
        ngram: The n-gram of each entry, shape (E,).
        times: How often the caption has it, shape (E,).
        norm: The norm of each caption's CIDEr vector, shape (R,).
    """

    keys: Ints
    frequency: Ints
    start: Ints
    ngram: Ints
    times: Ints
    norm: Floats

    def entries(self, first: int, last: int) -> Counts:
        """The entries of captions `first` to before `last`, which are numbered from 0."""
        begin, end = self.start[first], self.start[last]
        caption = np.repeat(np.arange(last - first), np.diff(self.start[first : last + 1]))
        return Counts(caption, self.ngram[begin:end].astype(np.int64), self.times[begin:end].astype(np.int64))


class ReferenceCorpus:
    """The references of a corpus, tokenised and counted; use one for every epoch. It takes some 90 bytes a token.

    Args:
        references: For each clip the tokens of one or more references.

    Raises:
        UserError: There is no clip, or a clip has no reference.
    """

    def __init__(self, references: Sequence[Sequence[Tokens]]) -> None:
        if len(references) == 0:
            raise UserError("There are no references: give at least one clip with one reference.")
        self.first = offsets(map(len, references), len(references))
        if (empty := np.flatnonzero(np.diff(self.first) == 0)).size:
            raise UserError(f"Clip {empty[0]} has no reference: leave it out or give it one.")
        self.vocabulary = Vocabulary()
        packed = Packed.pack(list(chain.from_iterable(references)), self.vocabulary)
        self.captions = Packed(packed.ids.astype(np.int32), packed.start)
        self.orders = self._count(packed)

    def __len__(self) -> int:
        """The number of clips."""
        return len(self.first) - 1

    def tokens(self) -> list[list[list[str]]]:
        """The tokens that were given: for each clip those of each reference."""
        words = list(self.vocabulary)
        captions = [[words[i] for i in self.captions.slice(r, r + 1).ids.tolist()] for r in range(len(self.captions.start) - 1)]
        return [captions[a:b] for a, b in zip(self.first[:-1], self.first[1:], strict=True)]

    def _count(self, packed: Packed) -> list[OrderCounts]:
        tables = [packed.ids[:0]]

        def number(order: int, prefix: Ints, last: Ints) -> Ints:
            table, numbers = rank(prefix, last)
            tables.append(table)
            return numbers

        orders = []
        bounds = self.first[_chunk_clips(packed.start[self.first])]
        for order, (caption, numbers) in enumerate(numbered(packed, number), start=1):
            cuts = np.searchsorted(caption, bounds).tolist()
            pieces = [count_pairs(caption[a:b] - c, numbers[a:b]) for a, b, c in zip(cuts[:-1], cuts[1:], bounds, strict=False)]
            orders.append(self._order(tables[-1], pieces, bounds, len(self.vocabulary) if order == 1 else len(tables[-1])))
        return orders

    def _order(self, table: Ints, pieces: list[Counts], bounds: Ints, size: int) -> OrderCounts:
        """One order from the counts of chunks; the captions of a chunk are numbered from 0, the first of them is at `bounds`."""
        captions = np.diff(bounds).tolist()
        ngram = np.concatenate([piece.ngram.astype(np.int32) for piece in pieces])
        times = np.concatenate([piece.times.astype(np.int32) for piece in pieces])
        once = ngram if len(self) == self.first[-1] else self._once_a_clip(pieces, bounds)
        frequency = np.bincount(once, minlength=size).astype(np.int32)
        inverse = inverse_frequency(frequency, len(self))
        norm = [norms(piece, inverse[piece.ngram], number) for piece, number in zip(pieces, captions, strict=True)]
        entries = [np.bincount(piece.caption, minlength=number) for piece, number in zip(pieces, captions, strict=True)]
        return OrderCounts(table, frequency, offsets(chain.from_iterable(entries), bounds[-1]), ngram, times, np.concatenate(norm))

    def _once_a_clip(self, pieces: list[Counts], bounds: Ints) -> Ints:
        """The n-grams of each clip, each once however many of its references have it."""
        clip = np.repeat(np.arange(len(self)), np.diff(self.first))
        each = (join(clip[piece.caption + first], piece.ngram) for piece, first in zip(pieces, bounds, strict=False))
        return np.concatenate([split(distinct(pairs))[1] for pairs in each])


def _chunk_clips(start: Ints) -> Ints:
    """The first clip of each chunk of about CHUNK_TOKENS tokens, and the number of clips, given where each clip's tokens begin, and end."""
    return np.append(np.flatnonzero(np.diff(start[:-1] // CHUNK_TOKENS, prepend=-1)), len(start) - 1)
