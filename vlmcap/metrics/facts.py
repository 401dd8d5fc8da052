"""Accuracy of facts: whether captions state the right facts of their own clip, where overlap scores reward style.

A fact (place, direction) has values (sea, mountain), and a value has phrases, any of which states it in a caption. The
accuracy is compared with that of the same predictions on the wrong clips: a model that ignores the video scores the
same on both.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from vlmcap.errors import UserError
from vlmcap.metrics.captions import check_captions
from vlmcap.metrics.tokenizers import normalize

_MEAN = "mean"
_Values: TypeAlias = list[str | None]
Span: TypeAlias = tuple[int, int, str]
"""Start, end and value of a phrase in a normalized text."""


@dataclass(frozen=True, slots=True)
class FactLexicon:
    """The phrases that state each value of each fact.

    Attributes:
        phrases: For each fact, every normalized phrase with its value.
    """

    phrases: Mapping[str, Mapping[str, str]]

    @classmethod
    def from_dict(cls, facts: object, *, source: str = "the fact lexicon") -> FactLexicon:
        """Builds a lexicon from `{fact: {value: [phrase, ...]}}`.

        Args:
            facts: Nested mapping, such as `{"place": {"바다": ["바다", "해변"]}}`.
            source: Name of the lexicon in errors.

        Returns:
            The lexicon.

        Raises:
            UserError: The mapping has another shape, there is no fact, a fact is called "mean", a phrase is empty or
                states two values of a fact.
        """
        if not isinstance(facts, dict) or not facts:
            raise UserError(
                f'{source} must be a non-empty object of the shape {{"fact": {{"value": ["phrase", ...]}}}}.'
            )
        if _MEAN in facts:
            raise UserError(
                f'{source} contains the fact "{_MEAN}", which is the key of the mean over facts; rename it.'
            )
        return cls({fact: _phrases_of(values, f"fact {fact!r} of {source}") for fact, values in facts.items()})

    @classmethod
    def from_json(cls, path: str | Path) -> FactLexicon:
        """Loads a lexicon from a UTF-8 JSON file in the form of `from_dict`.

        Raises:
            UserError: The file is missing, is not JSON, or has another shape.
        """
        try:
            facts = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"Cannot read the fact lexicon {path} ({error}); check the path and the JSON.") from error
        return cls.from_dict(facts, source=str(path))

    def extract(self, text: str) -> dict[str, str | None]:
        """Returns the value that the text states for each fact; None if it states none or more than one.

        Phrases are found anywhere in the normalized text, inside words too, because Korean particles and endings are
        attached to them. A phrase inside a longer phrase of the same fact does not count: "바닷가 마을" does not state
        "바닷가".
        """
        return {fact: _single({value for _, _, value in spans}) for fact, spans in self.find(text).items()}

    def find(self, text: str) -> dict[str, list[Span]]:
        """Returns start, end and value of the phrases that state each fact in the normalized text, in text order."""
        normalized = normalize(text)
        return {fact: _find(normalized, phrases) for fact, phrases in self.phrases.items()}


def fact_accuracy(
    predictions: Sequence[str], references: Sequence[Sequence[str]], lexicon: FactLexicon
) -> dict[str, float]:
    """Returns the share of clips whose prediction and first reference state the same value, per fact and as mean.

    Args:
        predictions: One text per clip.
        references: One or more texts per clip, of which the first is used. A clip counts for a fact only if that
            reference states it.
        lexicon: Facts to look for.

    Returns:
        A number between 0 and 1 for each fact, NaN if no reference states it, and under "mean" the mean over the
        others.

    Raises:
        UserError: There are no captions, their numbers differ, or they are not texts.
    """
    return _per_fact(
        (fact, _mean([p == r for p, r in zip(predicted, stated, strict=True) if r is not None]))
        for fact, predicted, stated in _extract_all(predictions, references, lexicon)
    )


def fact_counts(
    predictions: Sequence[str], references: Sequence[Sequence[str]], lexicon: FactLexicon
) -> npt.NDArray[np.int64]:
    """Counts for each clip and fact whether the prediction is right and whether the reference states it, (N, facts, 2).

    Facts are in the order of the lexicon. Arguments and errors are those of `fact_accuracy`.
    """
    columns = [
        [(p == r and r is not None, r is not None) for p, r in zip(predicted, stated, strict=True)]
        for _, predicted, stated in _extract_all(predictions, references, lexicon)
    ]
    return np.array(columns, np.int64).transpose(1, 0, 2)  # (facts, N, 2) -> (N, facts, 2)


def permutation_expectation(
    predictions: Sequence[str], references: Sequence[Sequence[str]], lexicon: FactLexicon
) -> dict[str, float]:
    """Returns the expected accuracy if every clip gets the prediction of another clip, per fact and as mean.

    It is exact: the mean of [value of prediction i = value of reference j] over all ordered pairs i != j in which
    reference j states the fact. With n clips, and counts of each value v among all predictions and among the m
    references that state the fact, it is

        (sum_v predicted(v) * stated(v)  -  matches on the own clip) / (m (n - 1)),

    which approaches sum_v p_predicted(v) * p_stated(v) for many clips. A model whose accuracy is not above it does not
    use the video.

    Args:
        predictions: One text per clip.
        references: One or more texts per clip, of which the first is used.
        lexicon: Facts to look for.

    Returns:
        As for `fact_accuracy`; all NaN for a single clip.

    Raises:
        UserError: There are no captions, their numbers differ, or they are not texts.
    """
    return _per_fact(
        (fact, _other_clip_accuracy(predicted, stated))
        for fact, predicted, stated in _extract_all(predictions, references, lexicon)
    )


def swapped_fact_accuracy(
    predictions: Sequence[str], references: Sequence[Sequence[str]], lexicon: FactLexicon, shifts: int
) -> dict[str, float]:
    """Returns the mean accuracy over `shifts` cyclic shifts of the predictions, spread evenly over 1..n-1.

    It samples what `permutation_expectation` computes exactly, and equals it for all n - 1 shifts.

    Args:
        predictions: One text per clip.
        references: One or more texts per clip, of which the first is used.
        lexicon: Facts to look for.
        shifts: Number of shifts, at least 1; more than n - 1 mean all of them.

    Returns:
        As for `fact_accuracy`; all NaN for a single clip.

    Raises:
        UserError: `shifts` is below 1, there are no captions, their numbers differ, or they are not texts.
    """
    if shifts < 1:
        raise UserError(f"shifts must be at least 1, not {shifts}.")
    largest = len(predictions) - 1
    count = min(shifts, largest)
    # The middles of `count` equal segments of 1..n-1, which are distinct and never the identity.
    steps = [1 + (2 * k + 1) * largest // (2 * count) for k in range(count)]

    def shifted(predicted: _Values, stated: _Values) -> float:
        hits = [
            predicted[(index + step) % len(predicted)] == value
            for step in steps
            for index, value in enumerate(stated)
            if value is not None
        ]
        return _mean(hits)

    return _per_fact(
        (fact, shifted(predicted, stated)) for fact, predicted, stated in _extract_all(predictions, references, lexicon)
    )


def _phrases_of(values: object, where: str) -> dict[str, str]:
    if not isinstance(values, dict) or not values:
        raise UserError(f"The {where} must be a non-empty object from value to a list of phrases.")
    phrases: dict[str, str] = {}
    for value, wordings in values.items():
        if not isinstance(wordings, list) or not wordings:
            raise UserError(f"The value {value!r} of {where} must be a non-empty list of phrases.")
        # Phrases are compared with normalized texts, and one phrase must not state two values of a fact.
        for wording in wordings:
            phrase = normalize(wording) if isinstance(wording, str) else ""
            if not phrase:
                raise UserError(f"The value {value!r} of {where} has a phrase that is empty or not text.")
            if phrases.setdefault(phrase, value) != value:
                raise UserError(
                    f"The phrase {phrase!r} of {where} states both {phrases[phrase]!r} and {value!r}; keep it in one "
                    "of them."
                )
    return phrases


def _find(text: str, phrases: Mapping[str, str]) -> list[Span]:
    spans = [
        (start, start + len(phrase), value) for phrase, value in phrases.items() for start in _occurrences(text, phrase)
    ]
    # Only spans that no other span contains count.
    return sorted(
        (start, end, value)
        for start, end, value in spans
        if not any(s <= start and end <= e and (s, e) != (start, end) for s, e, _ in spans)
    )


def _single(values: set[str]) -> str | None:
    return values.pop() if len(values) == 1 else None


def _occurrences(text: str, phrase: str) -> Iterator[int]:
    start = text.find(phrase)
    while start >= 0:
        yield start
        start = text.find(phrase, start + 1)


def _extract_all(
    predictions: Sequence[str], references: Sequence[Sequence[str]], lexicon: FactLexicon
) -> Iterator[tuple[str, _Values, _Values]]:
    """Yields for each fact the values of all predictions and of all first references."""
    check_captions(predictions, references)
    predicted = [lexicon.extract(text) for text in predictions]
    stated = [lexicon.extract(refs[0]) for refs in references]
    for fact in lexicon.phrases:
        yield fact, [values[fact] for values in predicted], [values[fact] for values in stated]


def _other_clip_accuracy(predicted: _Values, stated: _Values) -> float:
    stated_counts = Counter(value for value in stated if value is not None)
    predicted_counts = Counter(predicted)
    pairs = stated_counts.total() * (len(predicted) - 1)  # m (n - 1)
    if pairs == 0:
        return math.nan
    # The products of counts include each clip's own pair, which is no pair of two clips.
    same_clip = sum(p == s for p, s in zip(predicted, stated, strict=True) if s is not None)
    return (sum(predicted_counts[value] * count for value, count in stated_counts.items()) - same_clip) / pairs


def _mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / len(numbers) if numbers else math.nan


def _per_fact(pairs: Iterator[tuple[str, float]]) -> dict[str, float]:
    scores = dict(pairs)
    return scores | {_MEAN: _mean([score for score in scores.values() if not math.isnan(score)])}
