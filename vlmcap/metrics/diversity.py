"""What overlap scores do not show: a model that says the same for every clip, or that stops early."""

from __future__ import annotations

import math
from collections.abc import Sequence

from vlmcap.metrics.ngrams import Tokens, closest_length
from vlmcap.metrics.tokenizers import normalize


def distinct_ratio(predictions: Sequence[str]) -> float:
    """Distinct normalised predictions divided by predictions, above 0 and at most 1.

    A collapsed model says a handful of captions for every clip; 0.04 to 0.11 was seen while a reference-free score rose.

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
    closest = sum(closest_length(len(h), [len(r) for r in refs]) for h, refs in zip(hypotheses, references, strict=True))
    return sum(map(len, hypotheses)) / closest if closest else math.nan
