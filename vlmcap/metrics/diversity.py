"""Diversity of captions, which overlap scores do not measure.

It reveals a model that gives the same caption for every clip, repeats itself, or stops early.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence

from vlmcap.metrics.ngrams import Tokens, closest_length
from vlmcap.metrics.tokenizers import normalize

COLLAPSED_DISTINCT_RATIO = 0.5
"""Share of distinct captions below which `collapse_warning` warns.

People rarely describe two clips in the same words, while collapsed models had 0.04 to 0.11. A few similar clips, as in
a demo, may legitimately be below it."""

COLLAPSED_REPETITION_RATE = 0.2
"""Share of repeated 4-grams within captions above which `collapse_warning` warns.

It is 0.5 if captions state everything twice, and about 0.2 if a loop fills one caption in five."""

_ORDER = 4
# Captions in the sample, and captions that each of them is compared with.
_SELF_BLEU_CAPTIONS, _SELF_BLEU_OTHERS = 200, 100
# Fewer captions may be equal because their clips are.
_MIN_CAPTIONS_FOR_WARNING = 8


def distinct_ratio(predictions: Sequence[str]) -> float:
    """Returns distinct normalized predictions divided by predictions, above 0 and at most 1.

    A collapsed model uses a few captions for all clips; values of 0.04 to 0.11 were observed while a reference-free
    score rose.

    Args:
        predictions: One text per clip, at least one.

    Returns:
        The ratio; 1 if no two clips have the same caption.
    """
    return len({normalize(text) for text in predictions}) / len(predictions)


def length_ratio(hypotheses: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> float:
    """Returns the tokens of all hypotheses divided by the tokens of their references nearest in length.

    Below 1 captions are too short, often because `max_new_tokens` truncates them; above 1 they are too long.

    Args:
        hypotheses: Tokens of one prediction per clip.
        references: Tokens of one or more references per clip.

    Returns:
        The ratio, at least 0; NaN if the references have no tokens.
    """
    closest = sum(
        closest_length(len(h), [len(r) for r in refs]) for h, refs in zip(hypotheses, references, strict=True)
    )
    return sum(map(len, hypotheses)) / closest if closest else math.nan


def repetition_rate(hypotheses: Sequence[Tokens]) -> float:
    """Returns the share of 4-grams that occurred earlier in the same caption, over all captions; from 0 to below 1.

    A model in a loop ("바다가 보이고 바다가 보이고 …") comes close to 1.

    Args:
        hypotheses: Tokens of one prediction per clip.

    Returns:
        Repeated 4-grams divided by 4-grams; 0 if no caption has four tokens.
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
    """Returns the mean BLEU-4 of a caption against other captions (Zhu et al., "Texygen", SIGIR 2018).

    It is 0 if all captions are different and 1 if all are equal. It grows with the number of others, so only values of
    equal sizes are comparable. N captions would take N^2 comparisons, which a seeded sample limits: at most `captions`
    captions, each against the same `others` captions except itself.

    Args:
        hypotheses: Tokens of one prediction per clip.
        captions: Largest number of captions to score, at least 1.
        others: Largest number of captions to compare them with, at least 1.
        seed: Seed of the samples; the same seed and sizes select the same clips, independent of the captions.

    Returns:
        The mean, from 0 to 1; n-grams without a match count as 1e-15 matches, as in BLEU. NaN for fewer than two
        captions.
    """
    if len(hypotheses) < 2:
        return math.nan
    # A sample as large as the corpus is a permutation of it.
    shuffled = random.Random(seed).sample(range(len(hypotheses)), len(hypotheses))
    pool = shuffled[: others + 1]  # one more, since a caption in it is not compared with itself
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
    """Returns one sentence for the log if the captions have collapsed, else None.

    They have if fewer than half are distinct (`COLLAPSED_DISTINCT_RATIO`, from eight clips on), or if more than a fifth
    of the 4-grams of whitespace words are repeated in the same caption (`COLLAPSED_REPETITION_RATE`).

    Args:
        predictions: One text per clip.
    """
    if not predictions:
        return None
    ratio = distinct_ratio(predictions)
    if len(predictions) >= _MIN_CAPTIONS_FOR_WARNING and ratio < COLLAPSED_DISTINCT_RATIO:
        common, count = Counter(normalize(text) for text in predictions).most_common(1)[0]
        shown = common if len(common) <= 60 else f"{common[:60]}…"
        return (
            f"The captions have collapsed: only {ratio:.0%} of {len(predictions)} are distinct, and {count} clips get "
            f"{shown!r}; do not trust overlap scores."
        )
    # By words, as no tokenizer is given here and a loop repeats whole words.
    repeated = repetition_rate([normalize(text).split() for text in predictions])
    if repeated > COLLAPSED_REPETITION_RATE:
        return f"The captions repeat themselves: {repeated:.0%} of their 4-grams occur earlier in the same caption."
    return None


def _ngrams(tokens: Tokens, order: int) -> list[tuple[str, ...]]:
    return list(zip(*(tokens[start:] for start in range(order)), strict=False))


def _bleu(tokens: Tokens, references: list[list[Counter[tuple[str, ...]]]], lengths: list[int]) -> float:
    """Returns BLEU-4 of one caption with the constants of `ngram_scores`, given the n-gram counts of its references."""
    product = 1.0
    for order in range(_ORDER):
        ngrams = Counter(_ngrams(tokens, order + 1))
        matches = sum(
            min(count, max(reference[order][ngram] for reference in references)) for ngram, count in ngrams.items()
        )
        product *= (matches + 1e-15) / (ngrams.total() + 1e-9)  # clipped precision of this order
    ratio = (len(tokens) + 1e-15) / (closest_length(len(tokens), lengths) + 1e-9)
    return product ** (1 / _ORDER) * (math.exp(1 - 1 / ratio) if ratio < 1 else 1.0)
