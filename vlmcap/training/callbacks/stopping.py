"""Callbacks that stop a run early: early stopping that respects training stages, and pruning by a search."""

from __future__ import annotations

import math
from typing import Any, Protocol

import lightning as L
import torch
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.trainer.states import TrainerFn

from vlmcap.errors import TrialPruned
from vlmcap.training.callbacks.choosing import FALLBACK, Choice, Score
from vlmcap.training.schedule import StagePlan


class PatientStop(EarlyStopping):
    """Lightning's early stopping, limited to the validations of the last stage.

    Earlier stages always train to their end, because the next stage would otherwise begin with half-trained components
    and an unfinished learning rate schedule. Scores before and after a change of stage are not comparable, so neither
    the best value nor the wait count of an earlier stage carries over. The state is saved in every checkpoint. If the
    metric has never had a value, early stopping follows the validation loss instead.

    Args:
        plan: Training stages.
        monitor: Metric such as "val/loss".
        mode: "min" or "max".
        patience: Validations without improvement before the run stops.
        min_delta: Smallest difference that counts as an improvement.
    """

    def __init__(self, plan: StagePlan, *, monitor: str, mode: str, patience: int, min_delta: float) -> None:
        # Check after validation, not after the epoch: without a validation, the metric is that of an earlier epoch.
        # A metric without a value counts as no improvement; it does not stop the run immediately.
        super().__init__(
            monitor,
            mode=mode,
            patience=patience,
            min_delta=min_delta,
            check_finite=False,
            check_on_train_epoch_end=False,
            verbose=False,
        )
        # The last epoch belongs to the last stage.
        self._first_epoch = plan.at_epoch(plan.num_epochs - 1).first_epoch
        self.best_epoch = self._counted_epoch = -1
        self._configured_monitor, self._choice = monitor, Choice("early stopping", monitor, mode)

    @property
    def state_key(self) -> str:
        """Key of the state, which does not depend on the metric."""
        return type(self).__qualname__

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stops a resumed run that had stopped early."""
        if not getattr(pl_module, "needs_validation", False) and self.wait_count >= self.patience:
            trainer.should_stop = True

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Counts a validation, and prints the reason if the run stops."""
        epoch = trainer.current_epoch
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking or epoch < self._first_epoch:
            return
        if epoch == self._counted_epoch:  # a resumed run repeats a validation that was counted before the save
            return
        self._counted_epoch = epoch
        # Lightning raises if the monitored metric is missing, so a value is made up or another metric followed.
        if Score.of(trainer, None).value(self.monitor) is None:
            self._handle_missing_value(trainer)
        super().on_validation_end(trainer, pl_module)
        # Lightning resets the count when the metric has improved.
        if self.wait_count == 0:
            self.best_epoch = trainer.current_epoch
        if self.wait_count >= self.patience and trainer.is_global_zero:
            print(self.reason(trainer.current_epoch), flush=True)

    def _handle_missing_value(self, trainer: L.Trainer) -> None:
        """Follows the validation loss if the metric has never had a value; otherwise counts no improvement."""
        if not bool(torch.isfinite(self.best_score)) and self.monitor != FALLBACK:
            self._choice.warn_of_fallback(trainer.current_epoch)
            self._follow_loss()
            # Any finite loss is better than infinity.
            self.best_score, self.wait_count = torch.tensor(torch.inf), 0
        else:
            trainer.callback_metrics.setdefault(self.monitor, torch.tensor(torch.nan))

    def _follow_loss(self) -> None:
        # Lightning keeps the difference with the sign of the mode: negative for "min".
        self.monitor, self.mode, self.min_delta = FALLBACK, "min", -abs(self.min_delta)

    def reason(self, epoch: int) -> str:
        """Returns why the run stopped after `epoch`, counted from 0."""
        best = f"{float(self.best_score):.4g} of epoch {self.best_epoch + 1}"
        return (
            f"Stopped early after epoch {epoch + 1}: {self.monitor} was not better than {best} in {self.wait_count} "
            "validations."
        )

    def state_dict(self) -> dict[str, Any]:
        """Returns Lightning's state, the followed metric, and the best and the last counted epoch."""
        epochs = {"best_epoch": self.best_epoch, "counted_epoch": self._counted_epoch}
        return super().state_dict() | epochs | {"configured_monitor": self._configured_monitor, "monitor": self.monitor}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the result of `state_dict`, except the patience, which a resumed run may change.

        A state of another metric is ignored.
        """
        # The saved counts are of another metric.
        if state_dict["configured_monitor"] != self._configured_monitor:
            return
        patience = self.patience
        super().load_state_dict(state_dict)
        self.patience = patience
        self.best_epoch, self._counted_epoch = state_dict["best_epoch"], state_dict["counted_epoch"]
        # The saved run had no value of the metric and followed the loss, and so must this one.
        if state_dict["monitor"] != self.monitor:
            self._follow_loss()


class Trial(Protocol):
    """Interface of a hyperparameter search to a run, which Optuna's trials implement."""

    def report(self, value: float, step: int) -> None:
        """Reports the objective at a step."""

    def should_prune(self) -> bool:
        """Returns whether the run should stop, because other trials were better at the last reported step."""


class TrialPruning(L.Callback):
    """Reports the objective to a search after each validation; must come after `CaptionEvaluation`.

    Args:
        objective: Name of a metric. A metric that is not measured while training, such as a test score, never prunes.
        trial: Trial of the search.
    """

    def __init__(self, objective: str, trial: Trial) -> None:
        self._objective, self._trial = objective, trial

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Reports the objective, with the number of epochs as the step.

        Raises:
            TrialPruned: The search stops the trial.
        """
        value = float(trainer.callback_metrics.get(self._objective, math.nan))
        if trainer.sanity_checking or not math.isfinite(value):
            return
        epochs, is_worse = trainer.current_epoch + 1, False
        if trainer.is_global_zero:
            self._trial.report(value, epochs)
            is_last = epochs >= (trainer.max_epochs or 0)  # pruning would save no time here, and lose the final score
            is_worse = not is_last and self._trial.should_prune()
        # The search runs in the first process; the others hear from it whether to stop.
        if trainer.strategy.broadcast(is_worse):
            raise TrialPruned(
                f"{self._objective} of {value:.4f} after epoch {epochs} is worse than the median of the other trials "
                "at that epoch",
                value,
            )
