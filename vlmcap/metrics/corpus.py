"""Counting of references, done one time, and of captions against them.

BLEU, CIDEr and ROUGE-L of clips and of corpora are all computed from these counts.

    references = ReferenceCorpus(tokens_of_references)          # one time
    statistics = clip_statistics(tokens_of_captions, references)  # each epoch
    corpus_scores(statistics)                                    # bleu_1 .. bleu_4, cider, cider_d, rouge_l

Memory is proportional to the n-grams of the references: captions are counted about ten thousand tokens at a time.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import chain

import numpy as np
import numpy.typing as npt

from vlmcap.errors import UserError
from vlmcap.metrics.ngram_scores import (
    bleu_from_counts,
    cosine,
    inverse_frequency,
    length_penalty,
    ngrams_of_length,
    norms,
    scale,
)
from vlmcap.metrics.ngrams import (
    Counts,
    Ints,
    Packed,
    Tokens,
    Vocabulary,
    count_ngrams,
    count_pairs,
    distinct,
    join,
    look_up,
    numbered,
    offsets,
    rank,
    split,
)
from vlmcap.metrics.rouge import f_score, lcs_lengths

Floats = npt.NDArray[np.float64]

# Tokens counted at a time: arrays of this length fit the processor's cache, where sorting is twice as fast as in
# memory.
CHUNK_TOKENS = 1 << 17


@dataclass(frozen=True, slots=True)
class OrderCounts:
    """The n-grams of one order in all references.

    R captions, G distinct n-grams, E entries sorted by caption and n-gram.

    Attributes:
        keys: Sorted key of each n-gram, shape (G,); empty for order 1, where the token's id is the key.
        frequency: Number of clips that contain each n-gram, shape (G,).
        start: First entry of each caption, and E, shape (R + 1,).
        ngram: n-gram of each entry, shape (E,).
        times: Number of times that the caption contains it, shape (E,).
        norm: Norm of each caption's CIDEr vector, shape (R,).
    """

    keys: Ints
    frequency: Ints
    start: Ints
    ngram: Ints
    times: Ints
    norm: Floats

    def entries(self, first: int, last: int) -> Counts:
        """Returns the entries of captions `first` to `last` (exclusive), renumbered from 0."""
        begin, end = self.start[first], self.start[last]
        caption = np.repeat(np.arange(last - first), np.diff(self.start[first : last + 1]))
        return Counts(caption, self.ngram[begin:end].astype(np.int64), self.times[begin:end].astype(np.int64))


class ReferenceCorpus:
    """The tokenized and counted references of a corpus, for use in every epoch; takes about 90 bytes per token.

    Args:
        references: Tokens of one or more references per clip.

    Raises:
        UserError: There is no clip, or a clip has no reference.
    """

    def __init__(self, references: Sequence[Sequence[Tokens]]) -> None:
        if len(references) == 0:
            raise UserError("There are no references; give at least one clip with one reference.")
        self.first = offsets(map(len, references), len(references))
        if (empty := np.flatnonzero(np.diff(self.first) == 0)).size:
            raise UserError(f"Clip {empty[0]} has no reference; leave it out or give it one.")
        self.vocabulary = Vocabulary()
        packed = Packed.pack(list(chain.from_iterable(references)), self.vocabulary)
        # int32 halves the memory that is held over all epochs.
        self.captions = Packed(packed.ids.astype(np.int32), packed.start)
        self.orders = self._count(packed)

    def __len__(self) -> int:
        """Number of clips."""
        return len(self.first) - 1

    def tokens(self) -> list[list[list[str]]]:
        """Returns the given tokens: for each clip those of each reference."""
        words = list(self.vocabulary)
        captions = [
            [words[i] for i in self.captions.slice(r, r + 1).ids.tolist()] for r in range(len(self.captions.start) - 1)
        ]
        return [captions[a:b] for a, b in zip(self.first[:-1], self.first[1:], strict=True)]

    def _count(self, packed: Packed) -> list[OrderCounts]:
        tables = [packed.ids[:0]]

        # Called by `numbered` for orders 2 to 4; the number of an n-gram is its place in the table.
        def number(order: int, prefix: Ints, last: Ints) -> Ints:
            table, numbers = rank(prefix, last)
            tables.append(table)
            return numbers

        orders = []
        bounds = self.first[_chunk_clips(packed.start[self.first])]  # first caption of each chunk, and their number
        for order, (caption, numbers) in enumerate(numbered(packed, number), start=1):
            # `caption` ascends, so each chunk is one range of the n-grams.
            ends = np.searchsorted(caption, bounds).tolist()
            pieces = [
                count_pairs(caption[a:b] - c, numbers[a:b])  # captions numbered from 0 in each chunk
                for a, b, c in zip(ends[:-1], ends[1:], bounds, strict=False)
            ]
            orders.append(
                self._order(tables[-1], pieces, bounds, len(self.vocabulary) if order == 1 else len(tables[-1]))
            )
        return orders

    def _order(self, table: Ints, pieces: list[Counts], bounds: Ints, size: int) -> OrderCounts:
        """Builds the counts of one order from those of chunks, whose captions are numbered from 0.

        The first caption of a chunk has the number in `bounds`.
        """
        captions = np.diff(bounds).tolist()
        ngram = np.concatenate([piece.ngram.astype(np.int32) for piece in pieces])
        times = np.concatenate([piece.times.astype(np.int32) for piece in pieces])
        # With one reference per clip, a caption's n-grams are those of its clip, and already distinct.
        unique = ngram if len(self) == self.first[-1] else self._unique_per_clip(pieces, bounds)
        frequency = np.bincount(unique, minlength=size).astype(np.int32)
        inverse = inverse_frequency(frequency, len(self))
        norm = [norms(piece, inverse[piece.ngram], number) for piece, number in zip(pieces, captions, strict=True)]
        entries = [np.bincount(piece.caption, minlength=number) for piece, number in zip(pieces, captions, strict=True)]
        return OrderCounts(
            table, frequency, offsets(chain.from_iterable(entries), bounds[-1]), ngram, times, np.concatenate(norm)
        )

    def _unique_per_clip(self, pieces: list[Counts], bounds: Ints) -> Ints:
        """Returns the n-grams of each clip, without repetitions in its references."""
        clip = np.repeat(np.arange(len(self)), np.diff(self.first))
        # caption of the chunk -> caption -> clip
        each = (join(clip[piece.caption + first], piece.ngram) for piece, first in zip(pieces, bounds, strict=False))
        return np.concatenate([split(distinct(pairs))[1] for pairs in each])


@dataclass(frozen=True, slots=True, eq=False)
class ClipStatistics:
    """Statistics from which the scores of clips, and of any set of them, are computed; N clips.

    Attributes:
        matches: Clipped matches of order 1 to 4, shape (N, 4).
        ngrams: Number of n-grams of the hypothesis of order 1 to 4, shape (N, 4).
        hypothesis_length: Number of tokens of the hypothesis, shape (N,).
        reference_length: Number of tokens of the reference nearest in length, shape (N,).
        cider: CIDEr without the length penalty, 0 to 10, shape (N,); NaN if the corpus is one clip.
        cider_d: CIDEr-D, 0 to 10, shape (N,); NaN if the corpus is one clip.
        rouge_l: ROUGE-L, 0 to 1, shape (N,).
    """

    matches: Ints
    ngrams: Ints
    hypothesis_length: Ints
    reference_length: Ints
    cider: Floats
    cider_d: Floats
    rouge_l: Floats

    def take(self, clips: npt.ArrayLike) -> ClipStatistics:
        """Selects clips by index, where repeated ones count repeatedly, or by a mask; document frequencies are kept."""
        return ClipStatistics(*(getattr(self, field.name)[np.asarray(clips)] for field in fields(self)))


def clip_statistics(hypotheses: Iterable[Tokens], references: ReferenceCorpus) -> ClipStatistics:
    """Computes the counts and scores of each clip.

    Args:
        hypotheses: Tokens of one prediction per clip, in the order of the references. A generator is consumed on the
            fly, so a large corpus need not be in memory.
        references: Counted references.

    Returns:
        Statistics of the clips; CIDEr's document frequencies are those of all the references.

    Raises:
        UserError: The numbers of hypotheses and clips differ.
    """
    vocabulary = Vocabulary(references.vocabulary)
    chunks = [
        _score_chunk(Packed.pack(chunk, vocabulary), references, first)
        for first, chunk in _chunk_captions(hypotheses, references)
    ]
    columns = [np.concatenate([getattr(chunk, field.name) for chunk in chunks]) for field in fields(ClipStatistics)]
    statistics = ClipStatistics(*columns)
    if len(references) == 1:
        statistics.cider[:] = statistics.cider_d[:] = math.nan
    return statistics


def corpus_scores(statistics: ClipStatistics) -> dict[str, float]:
    """Computes `bleu_1` to `bleu_4`, `cider`, `cider_d` and `rouge_l` of the corpus.

    BLEU is that of the summed counts, the others are means over clips. Ranges are those of `score_captions`.
    """
    s = statistics
    bleu = bleu_from_counts(
        s.matches.sum(axis=0), s.ngrams.sum(axis=0), s.hypothesis_length.sum(), s.reference_length.sum()
    )
    scores = {f"bleu_{order}": float(score) for order, score in enumerate(bleu, start=1)}
    return scores | {name: float(getattr(s, name).mean()) for name in ("cider", "cider_d", "rouge_l")}


def by_category(statistics: ClipStatistics, categories: Sequence[Hashable]) -> dict[Hashable, dict[str, float]]:
    """Computes the corpus scores of each category, and its number of clips as `clips`.

    CIDEr keeps the document frequencies of the whole reference corpus, so it is defined for a category of one clip.

    Args:
        statistics: Statistics of all clips.
        categories: One label per clip, such as "sea" or 3; None is a label too.

    Returns:
        Category to scores, in the order of first occurrence.

    Raises:
        UserError: The numbers of labels and clips differ.
    """
    if len(categories) != len(statistics.rouge_l):
        raise UserError(
            f"There are {len(categories)} categories for {len(statistics.rouge_l)} clips; give each clip one."
        )
    clips: dict[Hashable, list[int]] = {}
    for index, category in enumerate(categories):
        clips.setdefault(category, []).append(index)
    return {
        category: corpus_scores(statistics.take(indices)) | {"clips": float(len(indices))}
        for category, indices in clips.items()
    }


def _chunk_captions(hypotheses: Iterable[Tokens], references: ReferenceCorpus) -> Iterator[tuple[int, list[Tokens]]]:
    """Yields the number of the first clip of each chunk, and the chunk's hypotheses."""
    number = np.diff(references.first).tolist()
    tokens = np.diff(references.captions.start[references.first]).tolist()
    chunk: list[Tokens] = []
    first = size = 0
    for clip, hypothesis in enumerate(hypotheses):
        if clip == len(number):
            raise UserError(f"There are more hypotheses than the {len(number)} clips with references; remove some.")
        chunk.append(hypothesis)
        # A hypothesis is compared with each of its references, so its tokens count once for each.
        size += max(tokens[clip], len(hypothesis) * number[clip])
        if size >= CHUNK_TOKENS:
            yield first, chunk
            first, size, chunk = clip + 1, 0, []
    if first + len(chunk) < len(number):
        raise UserError(f"There are {first + len(chunk)} hypotheses for {len(number)} clips; give each clip one.")
    if chunk:
        yield first, chunk


def _score_chunk(packed: Packed, references: ReferenceCorpus, first: int) -> ClipStatistics:
    # 1. Pair each hypothesis of the chunk with all its references.
    clips = len(packed.lengths)
    begin = references.first[first : first + clips + 1]
    others = references.captions.slice(begin[0], begin[-1])
    pairs = _Pairs(begin[:-1] - begin[0], np.diff(begin), np.repeat(np.arange(clips), np.diff(begin)))
    # 2. For each order, count BLEU's matches and add CIDEr's cosines.
    matches, cosines = [], np.zeros(len(pairs.hypothesis))
    for order, counts in zip(
        references.orders, count_ngrams(packed, [order.keys for order in references.orders[1:]]), strict=True
    ):
        inverse, known = _weights(counts, order, len(references))
        norm = norms(counts, inverse, clips)
        matched, dots = _match(
            Counts(*(c[known] for c in counts)), inverse[known], order.entries(begin[0], begin[-1]), pairs
        )
        matches.append(matched)
        cosines += cosine(dots, norm[pairs.hypothesis], order.norm[begin[0] : begin[-1]])
    # 3. Reduce the pairs to clips: the nearest length for BLEU, the mean for CIDEr, the best for ROUGE-L.
    difference = packed.lengths[pairs.hypothesis] - others.lengths
    return ClipStatistics(
        np.stack(matches, axis=1),
        ngrams_of_length(packed.lengths),
        packed.lengths,
        split(pairs.smallest(join(np.abs(difference), others.lengths)))[1],
        pairs.mean(scale(cosines)),
        pairs.mean(scale(cosines) * length_penalty(difference)),
        _rouge(packed, others, pairs),
    )


@dataclass(frozen=True, slots=True)
class _Pairs:
    """All pairs of a hypothesis of a chunk and one of its references.

    Attributes:
        first: First pair of each hypothesis.
        number: Number of pairs, that is of references, of each hypothesis.
        hypothesis: Hypothesis of each pair; its reference has the number of the pair.
    """

    first: Ints
    number: Ints
    hypothesis: Ints

    def mean(self, scores: Floats) -> Floats:
        return np.add.reduceat(scores, self.first) / self.number

    def largest(self, scores: Floats) -> Floats:
        return np.maximum.reduceat(scores, self.first)

    def smallest(self, values: Ints) -> Ints:
        return np.minimum.reduceat(values, self.first)


def _weights(counts: Counts, order: OrderCounts, clips: int) -> tuple[Floats, npt.NDArray[np.bool_]]:
    """Returns CIDEr's weight of each n-gram of the hypotheses, and whether any reference of the corpus contains it."""
    known = counts.ngram < len(order.frequency)
    frequency = np.zeros(len(known), np.int32)
    frequency[known] = order.frequency[counts.ngram[known]]
    return inverse_frequency(frequency, clips), known


def _match(counts: Counts, inverse: Floats, entries: Counts, pairs: _Pairs) -> tuple[Ints, Floats]:
    """Returns BLEU's clipped matches per hypothesis, and CIDEr's clipped dot product per pair, for one order."""
    table = join(entries.caption, entries.ngram)
    best = np.zeros(len(counts.ngram), np.int64)
    dots = np.zeros(len(pairs.hypothesis))
    for nth in range(pairs.number.max()):  # the n-th reference of all clips at once, in vector operations
        entry = np.flatnonzero(pairs.number[counts.caption] > nth)
        pair = pairs.first[counts.caption[entry]] + nth
        position, is_known = look_up(table, join(pair, counts.ngram[entry]))
        entry, position = entry[is_known], position[is_known]
        common = np.minimum(counts.times[entry], entries.times[position])
        best[entry] = np.maximum(best[entry], common)
        dots += np.bincount(pair[is_known], common * entries.times[position] * inverse[entry] ** 2, len(dots))
    return np.bincount(counts.caption, best, len(pairs.first)).astype(np.int64), dots


def _rouge(hypotheses: Packed, references: Packed, pairs: _Pairs) -> Floats:
    length, other = hypotheses.lengths[pairs.hypothesis], references.lengths
    lcs = lcs_lengths(hypotheses, references, pairs.hypothesis, np.arange(len(other)))
    # In the reference implementation an empty caption is one empty token; this also keeps both divisions defined.
    lcs[(length == 0) & (other == 0)] = 1
    return f_score(pairs.largest(lcs / np.maximum(length, 1)), pairs.largest(lcs / np.maximum(other, 1)))


def _chunk_clips(start: Ints) -> Ints:
    """Returns the first clip of each chunk of about CHUNK_TOKENS tokens, and the number of clips.

    Args:
        start: Position of each clip's first token, and the number of tokens.
    """
    return np.append(np.flatnonzero(np.diff(start[:-1] // CHUNK_TOKENS, prepend=-1)), len(start) - 1)
