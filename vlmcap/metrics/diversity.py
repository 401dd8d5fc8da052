"""What overlap scores do not show.

A model that says the same for every clip, that repeats itself, or that stops early.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence

from vlmcap.metrics.ngrams import Tokens, closest_length
from vlmcap.metrics.tokenizers import normalize

COLLAPSED_DISTINCT_RATIO = 0.5
"""Below this share of distinct captions `collapse_warning` speaks.

People hardly ever describe two clips in the same words, and collapsed
models were seen at 0.04 to 0.11. Few clips of few kinds, as in a demo, may go below it honestly."""

COLLAPSED_REPETITION_RATE = 0.2
"""Above this share of repeated 4-grams within captions `collapse_warning` speaks.

Captions that say everything twice have 0.5, or one in
five of them has been caught in a loop that fills it."""

_ORDER = 4
_SELF_BLEU_CAPTIONS, _SELF_BLEU_OTHERS = 200, 100
_FEWEST_FOR_WARNING = 8


def distinct_ratio(predictions: Sequence[str]) -> float:
    """Distinct normalised predictions divided by predictions, above 0 and at most 1.

    A collapsed model says a handful of captions for every clip; 0.04 to 0.11 was seen while a reference-free score
    rose.

    Args:
        predictions: One text a clip, at least one.

    Returns:
        The ratio; 1 when no two clips get the same caption.
    """
    return len({normalize(text) for text in predictions}) / len(predictions)


def length_ratio(hypotheses: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> float:
    """Tokens of all hypotheses divided by tokens of their references nearest in length.

    Below 1 captions are too short, often because `max_new_tokens` cuts them; above 1 they run on.

    Args:
        hypotheses: The tokens of one prediction a clip.
        references: For each clip the tokens of one or more references.

    Returns:
        The ratio, at least 0; NaN when the references hold no token at all.
    """
    closest = sum(
        closest_length(len(h), [len(r) for r in refs]) for h, refs in zip(hypotheses, references, strict=True)
    )
    return sum(map(len, hypotheses)) / closest if closest else math.nan


def repetition_rate(hypotheses: Sequence[Tokens]) -> float:
    """The share of a caption's 4-grams that the same caption has said before, over all captions; from 0 to below 1.

    A model in a loop ("바다가 보이고 바다가 보이고 …") comes close to 1.

    Args:
        hypotheses: The tokens of one prediction a clip.

    Returns:
        Repeated 4-grams divided by 4-grams; 0 when no caption has four tokens.
    """
    total = distinct = 0
    for tokens in hypotheses:
        ngrams = _ngrams(tokens, _ORDER)
        total += len(ngrams)
        distinct += len(set(ngrams))
    return (total - distinct) / total if total else 0.0


def self_bleu(
    hypotheses: Sequence[Tokens], *, captions: int = _SELF_BLEU_CAPTIONS, others: int = _SELF_BLEU_OTHERS, seed: int = 0
) -> float:
    """How much captions repeat each other.

    The mean BLEU-4 of a caption against other captions (Zhu et al., "Texygen", SIGIR 2018).

    0 is all different, 1 all the same. It grows with the number of others, so compare only values of equal sizes. Over
    N captions it takes N^2 comparisons; here a seeded sample bounds them: at most `captions` captions, each against the
    same `others` captions less itself.

    Args:
        hypotheses: The tokens of one prediction a clip.
        captions: The most captions to score, at least 1.
        others: The most captions to score them against, at least 1.
        seed: Chooses the samples; the same seed and sizes give the same clips, whatever the captions.

    Returns:
        The mean, from 0 to 1, with n-grams that do not occur counted as 1e-15 matches as in BLEU here; NaN for fewer
        than two captions.
    """
    if len(hypotheses) < 2:
        return math.nan
    shuffled = random.Random(seed).sample(range(len(hypotheses)), len(hypotheses))
    pool = shuffled[: others + 1]  # one more, as a caption in it is not compared with itself
    counts = {index: [Counter(_ngrams(hypotheses[index], order)) for order in range(1, _ORDER + 1)] for index in pool}
    scores = []
    for index in shuffled[:captions]:
        against = [other for other in pool if other != index][:others]
        scores.append(
            _bleu(
                hypotheses[index], [counts[other] for other in against], [len(hypotheses[other]) for other in against]
            )
        )
    return sum(scores) / len(scores)


def collapse_warning(predictions: Sequence[str]) -> str | None:
    """One sentence for the log when the captions have collapsed, None when they have not.

    They have when fewer than half are distinct (`COLLAPSED_DISTINCT_RATIO`, from eight clips on), or when more than a
    fifth of the 4-grams of words are said before in the same caption (`COLLAPSED_REPETITION_RATE`). Words are those of
    whitespace.

    Args:
        predictions: One text a clip.
    """
    if not predictions:
        return None
    ratio = distinct_ratio(predictions)
    if len(predictions) >= _FEWEST_FOR_WARNING and ratio < COLLAPSED_DISTINCT_RATIO:
        common, count = Counter(normalize(text) for text in predictions).most_common(1)[0]
        shown = common if len(common) <= 60 else f"{common[:60]}…"
        return (
            f"The captions have collapsed: only {ratio:.0%} of {len(predictions)} are distinct, and {count} clips get "
            f"{shown!r}; "
            "overlap scores are not to be trusted."
        )
    repeated = repetition_rate([normalize(text).split() for text in predictions])
    if repeated > COLLAPSED_REPETITION_RATE:
        return f"The captions repeat themselves: {repeated:.0%} of their 4-grams stand in the same caption before."
    return None


def _ngrams(tokens: Tokens, order: int) -> list[tuple[str, ...]]:
    return list(zip(*(tokens[start:] for start in range(order)), strict=False))


def _bleu(tokens: Tokens, references: list[list[Counter[tuple[str, ...]]]], lengths: list[int]) -> float:
    """BLEU-4 of one caption with the constants of `vlmcap.metrics.ngram_scores`.

    The others are counted once, unlike there.
    """
    product = 1.0
    for order in range(_ORDER):
        ngrams = Counter(_ngrams(tokens, order + 1))
        matches = sum(
            min(count, max(reference[order][ngram] for reference in references)) for ngram, count in ngrams.items()
        )
        product *= (matches + 1e-15) / (ngrams.total() + 1e-9)
    ratio = (len(tokens) + 1e-15) / (closest_length(len(tokens), lengths) + 1e-9)
    return product ** (1 / _ORDER) * (math.exp(1 - 1 / ratio) if ratio < 1 else 1.0)
