"""METEOR over tokens by exact match (Denkowski and Lavie, "Meteor Universal", WMT 2014; METEOR 1.5).

    F = P R / (alpha P + (1 - alpha) R),   penalty = gamma (chunks / matches)^beta,   METEOR = (1 - penalty) F

P and R are the weight of the matches over the weight of all tokens of hypothesis and reference, where a content word weighs delta and a
function word 1 - delta; chunks are runs of matches that are adjacent, in order, in both. The parameters are those that METEOR 1.5 has for
English, which COCO's evaluation uses for every language: alpha = 0.85, beta = 0.2, gamma = 0.6, delta = 0.75.

Left out are stems, WordNet synonyms, paraphrase tables, and the English words among the function words; they hold nothing for Hangul. So
on Korean tokens the numbers are those of the jar with `-l en -m exact`; on English they lie below METEOR's. COCO's evaluation adds `-norm`,
which cuts Hangul into syllables whatever tokens it is given: its METEOR of a Korean caption is close to that of the tokeniser `char` here.

For the corpus, matches, chunks and weights are summed before the formula, as the jar does; of several references the best one counts.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from vlmcap.metrics.ngrams import Tokens

_ALPHA, _BETA, _GAMMA, _DELTA = 0.85, 0.2, 0.6, 0.75
_BEAM = 40
# The punctuation in METEOR's English list of function words; "!" is not in it.
_FUNCTION_WORDS = frozenset([",", ".", '"', "'", "’", "“", "”", "(", ")", "-lrb-", "-rrb-", ":", "$", "-", "--", "—", "?"])


@dataclass(frozen=True, slots=True)
class MeteorStatistics:
    """The counts that METEOR of one caption, or of a whole corpus, is computed from.

    Attributes:
        matches: Matched tokens.
        chunks: Runs of matches; none when the caption equals its reference, so that it scores 1.
        matched_weight: Weight of the matched tokens.
        hypothesis_weight: Weight of all tokens of the hypothesis.
        reference_weight: Weight of all tokens of the reference.
    """

    matches: int = 0
    chunks: int = 0
    matched_weight: float = 0.0
    hypothesis_weight: float = 0.0
    reference_weight: float = 0.0

    def __add__(self, other: MeteorStatistics) -> MeteorStatistics:
        """The statistics of both sets of captions together."""
        return MeteorStatistics(
            self.matches + other.matches,
            self.chunks + other.chunks,
            self.matched_weight + other.matched_weight,
            self.hypothesis_weight + other.hypothesis_weight,
            self.reference_weight + other.reference_weight,
        )


def meteor_from_statistics(statistics: MeteorStatistics) -> float:
    """METEOR, between 0 and 1, from the counts of one caption or the sum over a corpus."""
    s = statistics
    if s.matches == 0:
        return 0.0
    precision, recall = s.matched_weight / s.hypothesis_weight, s.matched_weight / s.reference_weight
    f_mean = precision * recall / (_ALPHA * precision + (1 - _ALPHA) * recall)
    penalty = _GAMMA * (s.chunks / s.matches) ** _BETA
    return (1 - penalty) * f_mean


def meteor_statistics(hypothesis: Tokens, references: Sequence[Tokens]) -> MeteorStatistics:
    """The counts of one caption against whichever of its references scores best."""
    return max((_pair_statistics(hypothesis, reference) for reference in references), key=meteor_from_statistics)


def sentence_meteor(hypotheses: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> list[float]:
    """METEOR of each clip, between 0 and 1."""
    return [meteor_from_statistics(meteor_statistics(h, refs)) for h, refs in zip(hypotheses, references, strict=True)]


def corpus_meteor(hypotheses: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> float:
    """METEOR of the corpus, between 0 and 1, from the summed counts; not the mean of `sentence_meteor`.

    Args:
        hypotheses: The tokens of one prediction a clip.
        references: For each clip the tokens of one or more references.

    Returns:
        The score.
    """
    pairs = zip(hypotheses, references, strict=True)
    return meteor_from_statistics(sum((meteor_statistics(h, refs) for h, refs in pairs), MeteorStatistics()))


def _pair_statistics(hypothesis: Tokens, reference: Tokens) -> MeteorStatistics:
    best = _align(hypothesis, reference)
    matched = [token for position, token in enumerate(hypothesis) if best.used >> position & 1]
    chunks = 0 if list(hypothesis) == list(reference) else best.chunks
    return MeteorStatistics(len(matched), chunks, _weight(matched), _weight(hypothesis), _weight(reference))


def _weight(tokens: Tokens) -> float:
    return sum(1 - _DELTA if token in _FUNCTION_WORDS else _DELTA for token in tokens)


class _Alignment(NamedTuple):
    """An alignment of the reference up to some token; fewer is better in each of the first three, which are compared in this order.

    Attributes:
        misses: Reference tokens left unmatched.
        chunks: Chunks closed; the one still growing is not among them.
        distance: Sum of the distances between matched positions.
        end: The hypothesis position that would lengthen the growing chunk, -1 when no chunk is growing.
        used: Bit i is set when hypothesis token i is matched.
    """

    misses: int
    chunks: int
    distance: int
    end: int
    used: int


def _align(hypothesis: Tokens, reference: Tokens) -> _Alignment:
    """The alignment with most matches, then fewest chunks, then least distance between matched positions.

    Only words that occur more than once leave a choice, yet the best choice is hard to find in general: like METEOR, a beam search over the
    reference from left to right keeps the 40 best alignments, a tie going to the one found first.
    """
    positions: defaultdict[str, list[int]] = defaultdict(list)
    for position, token in enumerate(hypothesis):
        positions[token].append(position)
    in_reference = Counter(reference)

    beam = [_Alignment(misses=0, chunks=0, distance=0, end=-1, used=0)]
    for index, token in enumerate(reference):
        choices = positions.get(token, [])
        # A word that is once in both is matched for certain. Elsewhere leaving the reference token out may spare a chunk later.
        is_certain = in_reference[token] == 1 and len(choices) == 1
        extended: list[_Alignment] = []
        for alignment in beam:
            extended.extend(_extend(alignment, index, choices, is_certain=is_certain))
        extended.sort(key=_rank)
        beam = extended[:_BEAM]
    return min((_extend(alignment, len(reference), [], is_certain=False)[0] for alignment in beam), key=_rank)


def _rank(alignment: _Alignment) -> tuple[int, int, int]:
    return alignment[:3]


def _extend(alignment: _Alignment, index: int, choices: list[int], *, is_certain: bool) -> list[_Alignment]:
    """The alignments with the reference token at `index` matched to each free position of the choices, or to none of them."""
    misses, chunks, distance, end, used = alignment
    extended = []
    for position in choices:
        if used >> position & 1:
            continue
        # METEOR 1.5 adds the distance of an uncertain match to the choices tried after it, not to the match itself. That decides ties, and
        # so the number of chunks of long captions: without it a third of 60 generated ones had other chunks than the jar's.
        own = abs(position - index) if is_certain else 0
        closes = end not in (-1, position)
        extended.append(_Alignment(misses, chunks + closes, distance + own, position + 1, used | 1 << position))
        distance += abs(position - index)
    if not is_certain:
        extended.append(_Alignment(misses + 1, chunks + (end != -1), distance, -1, used))
    return extended
