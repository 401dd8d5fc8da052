"""Compares two validations by a metric, or by the loss if the metric has no value."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_only

FALLBACK = "val/loss"  # measured in every validation; lower is better


@dataclass(frozen=True, slots=True)
class Score:
    """Scores of a validation.

    Attributes:
        epoch: Validated epoch, from 0.
        step: Optimiser steps done.
        monitor: Monitored metric.
        scores: All metrics of the validation by name, such as "val/cider".
    """

    epoch: int
    step: int
    monitor: str | None
    scores: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, trainer: L.Trainer, monitor: str | None) -> Score:
        """Returns the scores of the validation that has just ended."""
        scores = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
        return cls(trainer.current_epoch, trainer.global_step, monitor, scores)

    def value(self, name: str) -> float | None:
        """Returns the value of a metric, or None if it was not measured or is not finite."""
        value = self.scores.get(name, math.nan)
        return value if math.isfinite(value) else None

    def plain(self) -> dict[str, Any]:
        """Returns plain data for a checkpoint."""
        return asdict(self)


class Choice:
    """Compares validations by a metric, or by the validation loss if the metric has no value in one of them.

    Args:
        what: What follows the metric, such as "early stopping"; named in the warning about the fallback.
        monitor: Name of the metric.
        mode: "min" or "max".
    """

    def __init__(self, what: str, monitor: str, mode: str) -> None:
        self.what, self.monitor, self.mode = what, monitor, mode
        self._has_warned = False

    def is_better(self, score: Score, best: Score | None) -> bool:
        """Returns whether a validation is better than the best one so far; the first validation always is."""
        value = score.value(self.monitor)
        if value is None:
            self.warn_of_fallback(score.epoch)
        if best is None:
            # Also without any value, so that a run always keeps a best checkpoint.
            return True
        best_value = best.value(self.monitor)
        if value is not None and best_value is not None:
            return value < best_value if self.mode == "min" else value > best_value
        # The metric is missing in one of the two validations, so both are compared by their losses.
        loss, best_loss = score.value(FALLBACK), best.value(FALLBACK)
        if loss is not None and best_loss is not None:
            return loss < best_loss
        # Nothing comparable: a validation with some value beats one without any.
        has_none = best_value is None and best_loss is None
        return has_none and (value is not None or loss is not None)

    @rank_zero_only
    def warn_of_fallback(self, epoch: int) -> None:
        """Warns, once, that the metric has no value."""
        if not self._has_warned:
            self._has_warned = True
            print(
                f"Warning: {self.monitor} has no value after epoch {epoch + 1}; {self.what} follows {FALLBACK} "
                "instead.",
                flush=True,
            )
