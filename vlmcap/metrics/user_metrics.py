"""A user's own metrics: functions of predictions and references that are scored beside ours.

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
"""One prediction and one or more references per clip -> a score of all clips, or one for each, of which the mean is the score."""
_OTHERS = ("loss", "clips")  # names under which something else is written
_GROUP = "metric"


def register_metric(name: str) -> Callable[[Metric], Metric]:
    """Makes a function a metric: it is in scores and reports under its name, and may be followed by `monitor=val/NAME`.

    Args:
        name: Letters, digits and underscores; no metric of ours.

    Raises:
        ValueError: The name cannot be taken.

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
    """Names of the registered metrics, in the order in which they were registered."""
    return tuple(MAKERS.get(_GROUP, {}))


def user_scores(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """The score of every registered metric.

    Raises:
        UserError: A metric fails, or gives no number.
    """
    return {
        name: value if isinstance(value, float) else float(np.mean(value))
        for name, value in _values(predictions, references).items()
    }


def user_scores_each(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[dict[str, float]]:
    """The scores of each clip, of the metrics that give them.

    Raises:
        UserError: A metric fails, or gives no number.
    """
    columns = {
        name: values for name, values in _values(predictions, references).items() if not isinstance(values, float)
    }
    return [{name: values[index] for name, values in columns.items()} for index in range(len(predictions))]


def _values(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float | list[float]]:
    return {name: _called(name, metric, predictions, references) for name, metric in MAKERS.get(_GROUP, {}).items()}


def _called(
    name: str, metric: Metric, predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> float | list[float]:
    try:
        found = metric(list(predictions), [list(texts) for texts in references])
        if not isinstance(found, Iterable):
            return float(found)
        values = [float(value) for value in found]
    except Exception as error:  # whatever the user's function raises
        raise UserError(
            f"the metric {name} failed ({type(error).__name__}: {first_line(error)}); correct it, or leave its plugin "
            "out"
        ) from error
    if len(values) != len(predictions):
        raise UserError(
            f"the metric {name} gives {len(values)} numbers for {len(predictions)} clips; return one number, or one "
            "per clip"
        )
    return [0.0 if math.isnan(value) else value for value in values]
