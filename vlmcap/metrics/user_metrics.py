"""Metrics by users: functions of predictions and references that are scored together with the built-in ones.

@register_metric("exclamations")
def exclamations(predictions, references):
return [text.count("!") for text in predictions]
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from vlmcap.config.kinds import MAKERS, claim
from vlmcap.errors import UserError, first_line
from vlmcap.metrics.scores import METRIC_LABELS

Metric = Callable[[Sequence[str], Sequence[Sequence[str]]], float | Sequence[float]]
"""Function from one prediction and one or more references per clip to a score of all clips, or to one score per clip,
whose mean is the score."""
_OTHERS = ("loss", "clips")  # names that are used for other values
_GROUP = "metric"


def register_metric(name: str) -> Callable[[Metric], Metric]:
    """Registers a function as a metric, which appears in scores and reports and can be used as `monitor=val/NAME`.

    Args:
        name: Letters, digits and underscores; must differ from the built-in metrics.

    Raises:
        ValueError: The name is invalid or taken.

    Example:
        >>> @register_metric("question_marks")
        ... def question_marks(predictions, references):
        ...     return [float(text.count("?")) for text in predictions]
    """
    if not name.isidentifier() or name in METRIC_LABELS or name in _OTHERS:
        raise ValueError(f"a metric cannot be called {name!r}; choose a new name of letters, digits and underscores")

    def decorate(metric: Metric) -> Metric:
        claim(MAKERS.setdefault(_GROUP, {}), _GROUP, name, metric)
        return metric

    return decorate


def user_metrics() -> tuple[str, ...]:
    """Returns the names of the registered metrics, in the order of registration."""
    return tuple(MAKERS.get(_GROUP, {}))


def user_scores(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Computes the score of every registered metric.

    Raises:
        UserError: A metric fails, or does not return numbers.
    """
    return {
        name: value if isinstance(value, float) else float(np.mean(value))
        for name, value in _evaluate_all(predictions, references).items()
    }


def user_scores_each(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[dict[str, float]]:
    """Computes the scores of each clip by the metrics that return one per clip.

    Raises:
        UserError: A metric fails, or does not return numbers.
    """
    columns = {
        name: values for name, values in _evaluate_all(predictions, references).items() if not isinstance(values, float)
    }
    return [{name: values[index] for name, values in columns.items()} for index in range(len(predictions))]


def _evaluate_all(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float | list[float]]:
    return {name: _evaluate(name, metric, predictions, references) for name, metric in MAKERS.get(_GROUP, {}).items()}


def _evaluate(
    name: str, metric: Metric, predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> float | list[float]:
    try:
        result = metric(list(predictions), [list(texts) for texts in references])
        if not isinstance(result, Iterable):
            return float(result)
        values = [float(value) for value in result]
    except Exception as error:  # the user's function may raise anything
        raise UserError(
            f"the metric {name} failed ({type(error).__name__}: {first_line(error)}); fix it, or remove its plugin"
        ) from error
    if len(values) != len(predictions):
        raise UserError(
            f"the metric {name} gives {len(values)} numbers for {len(predictions)} clips; return one number, or one "
            "per clip"
        )
    # A metric that is undefined for a clip, as for an empty caption, counts as 0.
    return [0.0 if math.isnan(value) else value for value in values]
