"""References counted once, and captions counted against them.

All that BLEU, CIDEr and ROUGE-L of clips and of corpora come from.

    references = ReferenceCorpus(tokens_of_references)          # once
    statistics = clip_statistics(tokens_of_captions, references)  # each epoch
    corpus_scores(statistics)                                    # bleu_1 .. bleu_4, cider, cider_d, rouge_l

Memory is in proportion to the n-grams of the references: captions are counted some ten thousand tokens at a time.
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

# Tokens counted at a time: arrays of this length sort in the processor's cache, twice as fast as in memory.
CHUNK_TOKENS = 1 << 17


@dataclass(frozen=True, slots=True)
class OrderCounts:
    """The n-grams of one order in all references.

    R captions, G distinct n-grams, E entries sorted by caption and n-gram.

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
        captions = [
            [words[i] for i in self.captions.slice(r, r + 1).ids.tolist()] for r in range(len(self.captions.start) - 1)
        ]
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
            pieces = [
                count_pairs(caption[a:b] - c, numbers[a:b])
                for a, b, c in zip(cuts[:-1], cuts[1:], bounds, strict=False)
            ]
            orders.append(
                self._order(tables[-1], pieces, bounds, len(self.vocabulary) if order == 1 else len(tables[-1]))
            )
        return orders

    def _order(self, table: Ints, pieces: list[Counts], bounds: Ints, size: int) -> OrderCounts:
        """One order from the counts of chunks.

        The captions of a chunk are numbered from 0, the first of them is at `bounds`.
        """
        captions = np.diff(bounds).tolist()
        ngram = np.concatenate([piece.ngram.astype(np.int32) for piece in pieces])
        times = np.concatenate([piece.times.astype(np.int32) for piece in pieces])
        once = ngram if len(self) == self.first[-1] else self._once_a_clip(pieces, bounds)
        frequency = np.bincount(once, minlength=size).astype(np.int32)
        inverse = inverse_frequency(frequency, len(self))
        norm = [norms(piece, inverse[piece.ngram], number) for piece, number in zip(pieces, captions, strict=True)]
        entries = [np.bincount(piece.caption, minlength=number) for piece, number in zip(pieces, captions, strict=True)]
        return OrderCounts(
            table, frequency, offsets(chain.from_iterable(entries), bounds[-1]), ngram, times, np.concatenate(norm)
        )

    def _once_a_clip(self, pieces: list[Counts], bounds: Ints) -> Ints:
        """The n-grams of each clip, each once however many of its references have it."""
        clip = np.repeat(np.arange(len(self)), np.diff(self.first))
        each = (join(clip[piece.caption + first], piece.ngram) for piece, first in zip(pieces, bounds, strict=False))
        return np.concatenate([split(distinct(pairs))[1] for pairs in each])


@dataclass(frozen=True, slots=True, eq=False)
class ClipStatistics:
    """What the scores of clips, and of any set of them, are computed from; N clips.

    Attributes:
        matches: Clipped matches of order 1 to 4, shape (N, 4).
        ngrams: n-grams of the hypothesis of order 1 to 4, shape (N, 4).
        hypothesis_length: Tokens of the hypothesis, shape (N,).
        reference_length: Tokens of the reference nearest in length, shape (N,).
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

    def take(self, rows: npt.ArrayLike) -> ClipStatistics:
        """The statistics of some clips: by number, repeated ones counted as often, or by a mask.

        Document frequencies stay as they were.
        """
        return ClipStatistics(*(getattr(self, field.name)[np.asarray(rows)] for field in fields(self)))


def clip_statistics(hypotheses: Iterable[Tokens], references: ReferenceCorpus) -> ClipStatistics:
    """The counts and scores of each clip.

    Args:
        hypotheses: The tokens of one prediction a clip, in the order of the references. A generator is read as it goes,
            so a large corpus need not be held.
        references: The references, counted.

    Returns:
        The statistics; CIDEr's document frequencies are those of all the references.

    Raises:
        UserError: There are not as many hypotheses as clips.
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
    """`bleu_1` to `bleu_4`, `cider`, `cider_d` and `rouge_l` of the clips together.

    BLEU is that of the summed counts, the others are means over clips. Scales as in `vlmcap.metrics.score_captions`.
    """
    s = statistics
    bleu = bleu_from_counts(
        s.matches.sum(axis=0), s.ngrams.sum(axis=0), s.hypothesis_length.sum(), s.reference_length.sum()
    )
    scores = {f"bleu_{order}": float(score) for order, score in enumerate(bleu, start=1)}
    return scores | {name: float(getattr(s, name).mean()) for name in ("cider", "cider_d", "rouge_l")}


def by_category(statistics: ClipStatistics, categories: Sequence[Hashable]) -> dict[Hashable, dict[str, float]]:
    """The corpus scores of the clips of each category, with their number as `clips`.

    CIDEr keeps the document frequencies of the whole reference corpus, so a category of one clip has one as well.

    Args:
        statistics: Of all clips.
        categories: One label a clip, such as "sea" or 3; None is a label like any other.

    Returns:
        Category to scores, in the order in which the categories first occur.

    Raises:
        UserError: The numbers of labels and clips differ.
    """
    if len(categories) != len(statistics.rouge_l):
        raise UserError(
            f"There are {len(categories)} categories for {len(statistics.rouge_l)} clips: give each clip one."
        )
    rows: dict[Hashable, list[int]] = {}
    for index, category in enumerate(categories):
        rows.setdefault(category, []).append(index)
    return {
        category: corpus_scores(statistics.take(found)) | {"clips": float(len(found))}
        for category, found in rows.items()
    }


def _chunk_captions(hypotheses: Iterable[Tokens], references: ReferenceCorpus) -> Iterator[tuple[int, list[Tokens]]]:
    """The number of the first clip of each chunk, and its hypotheses."""
    number = np.diff(references.first).tolist()
    tokens = np.diff(references.captions.start[references.first]).tolist()
    chunk: list[Tokens] = []
    first = size = 0
    for clip, hypothesis in enumerate(hypotheses):
        if clip == len(number):
            raise UserError(f"There are more hypotheses than the {len(number)} clips that have references.")
        chunk.append(hypothesis)
        size += max(tokens[clip], len(hypothesis) * number[clip])
        if size >= CHUNK_TOKENS:
            yield first, chunk
            first, size, chunk = clip + 1, 0, []
    if first + len(chunk) < len(number):
        raise UserError(f"There are {first + len(chunk)} hypotheses for {len(number)} clips: each clip needs one.")
    if chunk:
        yield first, chunk


def _score_chunk(packed: Packed, references: ReferenceCorpus, first: int) -> ClipStatistics:
    clips = len(packed.lengths)
    begin = references.first[first : first + clips + 1]
    others = references.captions.slice(begin[0], begin[-1])
    pairs = _Pairs(begin[:-1] - begin[0], np.diff(begin), np.repeat(np.arange(clips), np.diff(begin)))
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
    """Each hypothesis of a chunk with each of its references.

    Attributes:
        first: The first pair of each hypothesis.
        number: How many pairs, that is references, it has.
        hypothesis: The hypothesis of each pair. Its reference has the number of the pair.
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
    """CIDEr's weight of each n-gram of the hypotheses, and whether any reference of the corpus has it."""
    known = counts.ngram < len(order.frequency)
    frequency = np.zeros(len(known), np.int32)
    frequency[known] = order.frequency[counts.ngram[known]]
    return inverse_frequency(frequency, clips), known


def _match(counts: Counts, inverse: Floats, entries: Counts, pairs: _Pairs) -> tuple[Ints, Floats]:
    """BLEU's clipped matches of each hypothesis, and CIDEr's clipped dot product of each pair, for one order."""
    table = join(entries.caption, entries.ngram)
    best = np.zeros(len(counts.ngram), np.int64)
    dots = np.zeros(len(pairs.hypothesis))
    for nth in range(pairs.number.max()):
        rows = np.flatnonzero(pairs.number[counts.caption] > nth)
        pair = pairs.first[counts.caption[rows]] + nth
        place, there = look_up(table, join(pair, counts.ngram[rows]))
        rows, place = rows[there], place[there]
        common = np.minimum(counts.times[rows], entries.times[place])
        best[rows] = np.maximum(best[rows], common)
        dots += np.bincount(pair[there], common * entries.times[place] * inverse[rows] ** 2, len(dots))
    return np.bincount(counts.caption, best, len(pairs.first)).astype(np.int64), dots


def _rouge(hypotheses: Packed, references: Packed, pairs: _Pairs) -> Floats:
    length, other = hypotheses.lengths[pairs.hypothesis], references.lengths
    lcs = lcs_lengths(hypotheses, references, pairs.hypothesis, np.arange(len(other)))
    # An empty caption is one empty token in the reference implementation; this also keeps both divisions defined.
    lcs[(length == 0) & (other == 0)] = 1
    return f_score(pairs.largest(lcs / np.maximum(length, 1)), pairs.largest(lcs / np.maximum(other, 1)))


def _chunk_clips(start: Ints) -> Ints:
    """The first clip of each chunk of about CHUNK_TOKENS tokens, and the number of clips, given where each clip's tokens begin, and end."""
    return np.append(np.flatnonzero(np.diff(start[:-1] // CHUNK_TOKENS, prepend=-1)), len(start) - 1)
