"""Tells a search how a run is doing after each validation, and ends it where the search has seen enough."""

from __future__ import annotations

import math
from typing import Protocol

import lightning as L

from vlmcap.errors import Pruned
from vlmcap.training.callbacks.evaluation import CaptionEvaluation


class Trial(Protocol):
    """A run as its search sees it; Optuna's trials are such."""

    def report(self, value: float, step: int) -> None:
        """Takes the objective at a step."""

    def should_prune(self) -> bool:
        """Whether others were better at the last step."""


class TrialPruning(L.Callback):
    """Reports the objective after each validation; stands behind the evaluation in the list of callbacks.

    Args:
        evaluation: Has the scores.
        objective: Its name. One that is not measured while training, such as a test score, prunes nothing.
        trial: Of the search.
    """

    def __init__(self, evaluation: CaptionEvaluation, objective: str, trial: Trial) -> None:
        self._evaluation, self._objective, self._trial = evaluation, objective, trial

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Reports, with the number of epochs as the step.

        Raises:
            Pruned: The search has seen enough.
        """
        value = self._evaluation.scores.get(self._objective, math.nan)
        if trainer.sanity_checking or not math.isfinite(value):
            return
        epochs, is_worse = trainer.current_epoch + 1, False
        if trainer.is_global_zero:
            self._trial.report(value, epochs)
            is_last = epochs >= (trainer.max_epochs or 0)  # nothing is saved by then, and a score would be lost
            is_worse = not is_last and self._trial.should_prune()
        if trainer.strategy.broadcast(is_worse):
            raise Pruned(f"{self._objective} of {value:.4f} after epoch {epochs} is worse than the median of the other trials there", value)
