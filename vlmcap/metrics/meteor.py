"""METEOR over tokens by exact match (Denkowski and Lavie, "Meteor Universal", WMT 2014; METEOR 1.5).

    F = P R / (alpha P + (1 - alpha) R),   penalty = gamma (chunks / matches)^beta,   METEOR = (1 - penalty) F

P and R are the weight of the matches over the weight of all tokens of hypothesis and reference, where a content word
has weight delta and a function word 1 - delta; chunks are runs of matches that are adjacent and in order in both. The
parameters are those of METEOR 1.5 for English, which COCO's evaluation uses for every language: alpha = 0.85,
beta = 0.2, gamma = 0.6, delta = 0.75.

Stems, WordNet synonyms, paraphrase tables, and the English words among the function words are left out; they contain
nothing for Hangul. So on Korean tokens the scores are those of the jar with `-l en -m exact`; on English they are lower
than METEOR's. COCO's evaluation adds `-norm`, which splits Hangul into syllables for any tokens: its METEOR of a Korean
caption is close to that of the tokenizer `char` here.

For the corpus, matches, chunks and weights are summed before the formula, as in the jar; of several references the best
one counts.

`meteor_ko` applies the same alignment to Korean stems, like METEOR's stem stage for English, with mecab-ko in place of
the stemmer. The text is split into morphemes, so an inflected verb or adjective matches by its stem, whatever its
ending (달립니다, 달렸다, 달리는: 달리). Particles, endings, auxiliary verbs, affixes and punctuation are the function
words: each has weight 1 - delta = 0.25 instead of 0.75, and matches if it is the same one, where forms that only depend
on the preceding sound count as one (이/가, 을/를, 았/었, ㅂ니다/습니다). A content word matches a content word, never a
function word of the same form. The parameters are those that METEOR 1.5 tuned on English, as there are no Korean
judgements to tune them on. Use it to compare runs, not to compare with METEOR in published work. Synonyms are not
matched; `content_scores` takes a file of them.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vlmcap.metrics.morphemes import Morpheme, analyze_many
from vlmcap.metrics.ngrams import Tokens

_ALPHA, _BETA, _GAMMA = 0.85, 0.2, 0.6
_CONTENT, _FUNCTION = 0.75, 0.25  # delta and 1 - delta
_BEAM = 40
_SORT_ABOVE = 50  # candidates; any number from the beam's size on gives the same alignments, this one is the fastest
_SERIAL_BITS = 24  # enough for the beam size times the occurrences of one word
# Punctuation in METEOR's English list of function words, which lacks "!".
_FUNCTION_WORDS = frozenset(
    [",", ".", '"', "'", "’", "“", "”", "(", ")", "-lrb-", "-rrb-", ":", "$", "-", "--", "—", "?"]
)
# Prefix of function word tokens; normalized text contains no tab.
_MARK = "\t"
# "|" separates groups of forms, of which the first represents the others.
_EQUIVALENT = (
    # particles
    "이 가|은 는|을 를|와 과|로 으로|로서 으로서|로써 으로써|아 야|이나 나|이랑 랑|이라는 라는|이라고 라고",
    # endings, whose final consonants the dictionary writes in either of two ways
    "았 었 였|아 어 여|아서 어서 여서|아요 어요 여요|아도 어도 여도|아야 어야 여야|며 으며|면 으면|면서 으면서|"
    "ᄂ 은 ᆫ|ᄅ 을 ᆯ|ᄇ니다 습니다 ᆸ니다|ᄂ다 는다 ᆫ다",
)
_PARTICLES, _ENDINGS = (
    {form: forms.split()[0] for forms in table.split("|") for form in forms.split()} for table in _EQUIVALENT
)


@dataclass(frozen=True, slots=True)
class MeteorStatistics:
    """The counts from which METEOR of one caption, or of a whole corpus, is computed.

    Attributes:
        matches: Number of matched tokens.
        chunks: Number of runs of matches; 0 if the caption equals its reference, so that it scores 1.
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
        """Returns the statistics of both sets of captions together."""
        return MeteorStatistics(
            self.matches + other.matches,
            self.chunks + other.chunks,
            self.matched_weight + other.matched_weight,
            self.hypothesis_weight + other.hypothesis_weight,
            self.reference_weight + other.reference_weight,
        )


def meteor_from_statistics(statistics: MeteorStatistics) -> float:
    """Computes METEOR, between 0 and 1, from the counts of one caption or their sum over a corpus."""
    s = statistics
    if s.matches == 0:
        return 0.0
    precision, recall = s.matched_weight / s.hypothesis_weight, s.matched_weight / s.reference_weight
    f_mean = precision * recall / (_ALPHA * precision + (1 - _ALPHA) * recall)
    penalty = _GAMMA * (s.chunks / s.matches) ** _BETA
    return (1 - penalty) * f_mean


def token_weight(token: str) -> float:
    """Returns 0.25 for punctuation among METEOR 1.5's English function words, 0.75 for any other token."""
    return _FUNCTION if token in _FUNCTION_WORDS else _CONTENT


def meteor_statistics(
    hypothesis: Tokens, references: Sequence[Tokens], weigh: Callable[[str], float] = token_weight
) -> MeteorStatistics:
    """Returns the counts of one caption against its best reference; `weigh` gives the weight of a token."""
    distinct = dict.fromkeys(map(tuple, references))  # equal references are aligned only one time
    # max() keeps the first of equally good references.
    return max(
        (_pair_statistics(tuple(hypothesis), reference, weigh) for reference in distinct), key=meteor_from_statistics
    )


def sentence_meteor(hypotheses: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> list[float]:
    """Returns METEOR of each clip, between 0 and 1."""
    return [meteor_from_statistics(meteor_statistics(h, refs)) for h, refs in zip(hypotheses, references, strict=True)]


def corpus_meteor(hypotheses: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> float:
    """Returns METEOR of the corpus, between 0 and 1, from the summed counts; it is not the mean of `sentence_meteor`.

    Args:
        hypotheses: Tokens of one prediction per clip.
        references: Tokens of one or more references per clip.
    """
    pairs = zip(hypotheses, references, strict=True)
    return meteor_from_statistics(sum((meteor_statistics(h, refs) for h, refs in pairs), MeteorStatistics()))


def corpus_meteor_ko(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Returns METEOR of the corpus over Korean stems, between 0 and 1, from the summed `meteor_ko_statistics`.

    Args:
        predictions: One text per clip, which is normalized here.
        references: One or more texts per clip.

    Raises:
        UserError: mecab-ko is not installed.
    """
    return meteor_from_statistics(sum(meteor_ko_statistics(predictions, references), MeteorStatistics()))


def meteor_ko_statistics(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[MeteorStatistics]:
    """Returns the counts of each clip over Korean stems, for scores of clips and for `vlmcap.metrics.significance`.

    Raises:
        UserError: mecab-ko is not installed.
    """
    hypotheses = analyze_many(predictions)
    flat = iter(analyze_many([reference for refs in references for reference in refs]))
    counted = []
    for hypothesis, refs in zip(hypotheses, references, strict=True):
        stems = [_stems(next(flat)) for _ in refs]
        counted.append(meteor_statistics(_stems(hypothesis), stems, _stem_weight))
    return counted


def _pair_statistics(
    hypothesis: tuple[str, ...], reference: tuple[str, ...], weigh: Callable[[str], float]
) -> MeteorStatistics:
    used, chunks = _align(hypothesis, reference)
    matched = [token for position, token in enumerate(hypothesis) if used >> position & 1]  # bit i: token i is matched
    if hypothesis == reference:
        chunks = 0
    weights = (sum(map(weigh, tokens)) for tokens in (matched, hypothesis, reference))
    return MeteorStatistics(len(matched), chunks, *weights)


class _Beam:
    """The best alignments of the reference up to some token, in order.

    They are parallel lists, as this is the inner loop of METEOR. The rank of an alignment packs (misses, chunks closed,
    distance) into one integer, which compares like the triple; lower is better.

    Attributes:
        ranks: Sorted ranks, minus `base`.
        base: Common summand of all ranks: most words leave no choice, and cost every alignment the same.
        ends: Hypothesis position that would extend the open chunk, -1 if no chunk is open.
        used: Bit i is set if hypothesis token i is matched and there was a choice.
        certain: Bit i is set if hypothesis token i is matched in every alignment.
    """

    def __init__(self, chunk: int, miss: int) -> None:
        self.chunk, self.miss = chunk, miss
        self.ranks, self.ends, self.used = [0], [-1], [0]
        self.base = self.certain = 0

    def leave_out(self) -> None:
        """Extends each alignment by a reference token that the hypothesis does not contain."""
        self._extend_all(self.miss, going_on=-1, end=-1)

    def match(self, position: int, distance: int) -> None:
        """Extends each alignment by a word that occurs one time in both texts, and so is matched in any case."""
        self.certain |= 1 << position
        self._extend_all(distance, going_on=position, end=position + 1)

    def _extend_all(self, cost: int, going_on: int, end: int) -> None:
        """Adds the cost to all, and a chunk to those whose open chunk does not continue at `going_on`; set the end."""
        closes = [old not in (-1, going_on) for old in self.ends]
        self.base += cost
        if all(closes):
            self.base += self.chunk
        elif any(closes):
            # Only some alignments pay for a chunk, so their order may change; sorting keeps ties in order.
            self.ranks = [
                rank + self.chunk if closing else rank for rank, closing in zip(self.ranks, closes, strict=True)
            ]
            order = sorted(range(len(self.ranks)), key=self.ranks.__getitem__)
            self.ranks, self.used = [self.ranks[index] for index in order], [self.used[index] for index in order]
        self.ends = [end] * len(self.ends)

    def branch(self, choices: list[tuple[int, int, int]]) -> None:
        """Extends each alignment by a match at each free choice, and by no match.

        METEOR 1.5 adds the distance of an uncertain match to the choices tried after it, not to the match itself. That
        decides ties, and so the number of chunks of long captions: otherwise a third of 60 generated ones had other
        chunks than those of the jar.

        Args:
            choices: Hypothesis position, its bit, and its distance in a code, of each choice.
        """
        chunk, miss, width = self.chunk << _SERIAL_BITS, self.miss << _SERIAL_BITS, len(choices) + 1
        lengthening = {position for position, _, _ in choices}
        # A code is a rank and, in the lower bits, the serial number of the candidate: sorted codes are stably sorted
        # ranks. No extension lowers a rank, so once there is a full beam of candidates, everything above its last one
        # can be dropped early.
        limit, codes = math.inf, []
        for index, (rank, end, used) in enumerate(zip(self.ranks, self.ends, self.used, strict=True)):
            # Candidates of alignment `index` have the serial numbers index * width to index * width + width - 1.
            code = rank << _SERIAL_BITS | index * width
            if code >= limit:
                break
            closing = code if end == -1 else code + chunk
            if closing >= limit and end not in lengthening:
                continue
            for position, bit, distance in choices:
                if not used & bit:
                    if end == position:
                        if code < limit:
                            codes.append(code)
                    elif closing < limit:
                        codes.append(closing)
                    elif end not in lengthening or position > end:
                        break  # later choices rank even higher
                    code += distance
                    closing += distance
                code += 1
                closing += 1
            # The last candidate of an alignment matches nothing, which closes its chunk.
            if closing + miss < limit:
                codes.append(closing + miss)
            if len(codes) > _SORT_ABOVE:
                codes.sort()
                del codes[_BEAM:]
                limit = codes[-1]
        codes.sort()
        self._keep(codes[:_BEAM], choices)

    def _keep(self, codes: list[int], choices: list[tuple[int, int, int]]) -> None:
        """Decodes the best candidates into the lists of alignments."""
        width, before = len(choices) + 1, self.used
        # By the choice: the next position of the open chunk, and the bit of the match; the last entry is "no match".
        next_ends, bits = [position + 1 for position, _, _ in choices] + [-1], [bit for _, bit, _ in choices] + [0]
        serials = [code & (1 << _SERIAL_BITS) - 1 for code in codes]
        self.ranks = [code >> _SERIAL_BITS for code in codes]
        self.ends = [next_ends[serial % width] for serial in serials]
        self.used = [before[serial // width] | bits[serial % width] for serial in serials]


def _align(hypothesis: Tokens, reference: Tokens) -> tuple[int, int]:
    """Returns the matched hypothesis positions, as bits, and the number of chunks of the best alignment.

    It has most matches, then fewest chunks, then the smallest distance. Only words that occur more than once leave a
    choice, yet the best choice is hard to find in general. As in METEOR, a beam search over the reference from left to
    right keeps the 40 best alignments; the first one found wins a tie.
    """
    positions: defaultdict[str, list[int]] = defaultdict(list)
    for position, token in enumerate(hypothesis):
        positions[token].append(position)
    in_reference = Counter(reference)
    # Larger than any sum of distances: every token of the reference adds at most the distances of all its choices.
    # A rank is misses * miss + chunks * chunk + distance, so fewer misses come first, then fewer chunks.
    chunk = len(reference) * len(hypothesis) * max(len(reference), len(hypothesis)) + 1
    beam = _Beam(chunk, miss=chunk * (len(reference) + 2))
    for index, token in enumerate(reference):
        choices = positions.get(token)
        if not choices:
            beam.leave_out()
        elif in_reference[token] == 1 and len(choices) == 1:
            beam.match(choices[0], abs(choices[0] - index))
        else:  # even if a match is free, skipping the reference token may save a chunk later
            beam.branch([(position, 1 << position, abs(position - index) << _SERIAL_BITS) for position in choices])
    beam.leave_out()  # closes the open chunks; the miss that it adds to every alignment changes no order
    # The first alignment is the best; the remainder of its rank is that of chunks and distance.
    return beam.used[0] | beam.certain, (beam.base + beam.ranks[0]) % beam.miss // beam.chunk


def _stems(morphemes: list[Morpheme]) -> list[str]:
    return [_function_token(m) if m.is_function else m.form for m in morphemes]


def _function_token(morpheme: Morpheme) -> str:
    # Only words of one kind are forms of each other: 은 is both a particle and an ending.
    kind = morpheme.tag[0]
    equivalent = {"J": _PARTICLES, "E": _ENDINGS}.get(kind, {})
    return f"{_MARK}{kind}{equivalent.get(morpheme.form, morpheme.form)}"


def _stem_weight(token: str) -> float:
    return _FUNCTION if token.startswith(_MARK) else _CONTENT
