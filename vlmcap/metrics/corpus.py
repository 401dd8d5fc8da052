"""References counted once, and captions counted against them: all that BLEU, CIDEr and ROUGE-L of clips and of corpora come from.

    references = ReferenceCorpus(tokens_of_references)          # once
    statistics = clip_statistics(tokens_of_captions, references)  # each epoch
    corpus_scores(statistics)                                    # bleu_1 .. bleu_4, cider, cider_d, rouge_l

Memory is in proportion to the n-grams of the references: captions are counted some ten thousand tokens at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

from vlmcap.errors import UserError
from vlmcap.metrics.bleu import bleu_from_counts, ngrams_of_length
from vlmcap.metrics.cider import cosine, inverse_frequency, length_penalty, norms, scale
from vlmcap.metrics.ngrams import Counts, Ints, Packed, Tokens, Vocabulary, count_ngrams, join, look_up, split
from vlmcap.metrics.references import CHUNK_TOKENS, OrderCounts, ReferenceCorpus
from vlmcap.metrics.rouge import f_score, lcs_lengths

__all__ = ["ClipStatistics", "ReferenceCorpus", "clip_statistics", "corpus_scores"]

Floats = npt.NDArray[np.float64]


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
        """The statistics of some clips: by number, repeated ones counted as often, or by a mask. Document frequencies stay as they were."""
        return ClipStatistics(*(getattr(self, field.name)[np.asarray(rows)] for field in fields(self)))


def clip_statistics(hypotheses: Iterable[Tokens], references: ReferenceCorpus) -> ClipStatistics:
    """The counts and scores of each clip.

    Args:
        hypotheses: The tokens of one prediction a clip, in the order of the references. A generator is read as it goes, so a large corpus
            need not be held.
        references: The references, counted.

    Returns:
        The statistics; CIDEr's document frequencies are those of all the references.

    Raises:
        UserError: There are not as many hypotheses as clips.
    """
    vocabulary = Vocabulary(references.vocabulary)
    chunks = [_score_chunk(Packed.pack(chunk, vocabulary), references, first) for first, chunk in _chunk_captions(hypotheses, references)]
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
    bleu = bleu_from_counts(s.matches.sum(axis=0), s.ngrams.sum(axis=0), s.hypothesis_length.sum(), s.reference_length.sum())
    scores = {f"bleu_{order}": float(score) for order, score in enumerate(bleu, start=1)}
    return scores | {name: float(getattr(s, name).mean()) for name in ("cider", "cider_d", "rouge_l")}


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
    for order, counts in zip(references.orders, count_ngrams(packed, [order.keys for order in references.orders[1:]]), strict=True):
        inverse, known = _weights(counts, order, len(references))
        norm = norms(counts, inverse, clips)
        matched, dots = _match(Counts(*(c[known] for c in counts)), inverse[known], order.entries(begin[0], begin[-1]), pairs)
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
