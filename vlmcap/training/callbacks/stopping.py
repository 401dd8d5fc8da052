"""Callbacks that end a run early: patience that is fair to tuning in stages, and a search that has seen enough."""

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
    """Lightning's early stopping, counted after each validation of the last stage.

    A stage is as long as its rates' schedule; ended before, the next one would begin with half-trained parts, and what
    follows a change of stage is not comparable with what was before. So earlier stages train to their ends, and neither
    their best value nor their waiting counts in the last one. The state is in every checkpoint. Where the metric has no
    value before it has ever had one, the validation loss takes its place.

    Args:
        plan: Stages.
        monitor: Metric such as "val/loss".
        mode: "min" or "max".
        patience: Validations without a better value.
        min_delta: By which a value must be better.
    """

    def __init__(self, plan: StagePlan, *, monitor: str, mode: str, patience: int, min_delta: float) -> None:
        # After validation and not after the epoch: where an epoch is not validated, the metric is that of an earlier
        # one. A metric without a value is not better, and no reason to stop at once.
        super().__init__(
            monitor,
            mode=mode,
            patience=patience,
            min_delta=min_delta,
            check_finite=False,
            check_on_train_epoch_end=False,
            verbose=False,
        )
        self._first_epoch = plan.at_epoch(plan.num_epochs - 1).first_epoch
        self.best_epoch = self._heard_epoch = -1
        self._asked, self._choice = monitor, Choice("early stopping", monitor, mode)

    @property
    def state_key(self) -> str:
        """One key, whatever metric is followed in the end."""
        return type(self).__qualname__

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stops a resumed run that had stopped early."""
        if not getattr(pl_module, "owes_validation", False) and self.wait_count >= self.patience:
            trainer.should_stop = True

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Counts a validation, and says so when it was the last."""
        epoch = trainer.current_epoch
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking or epoch < self._first_epoch:
            return
        if epoch == self._heard_epoch:  # a validation that a resumed run repeats, heard before the checkpoint was saved
            return
        self._heard_epoch = epoch
        if Score.of(trainer, None).value(self.monitor) is None:
            self._do_without_value(trainer)
        super().on_validation_end(trainer, pl_module)
        if self.wait_count == 0:
            self.best_epoch = trainer.current_epoch
        if self.wait_count >= self.patience and trainer.is_global_zero:
            print(self.reason(trainer.current_epoch), flush=True)

    def _do_without_value(self, trainer: L.Trainer) -> None:
        """Follows the validation loss if the metric has never had a value; otherwise this validation is no better."""
        if not bool(torch.isfinite(self.best_score)) and self.monitor != FALLBACK:
            self._choice.say_fallback(trainer.current_epoch)
            self._follow_loss()
            self.best_score, self.wait_count = torch.tensor(torch.inf), 0
        else:
            trainer.callback_metrics.setdefault(self.monitor, torch.tensor(torch.nan))

    def _follow_loss(self) -> None:
        self.monitor, self.mode, self.min_delta = FALLBACK, "min", -abs(self.min_delta)

    def reason(self, epoch: int) -> str:
        """Why the run stopped after an epoch, counted from 0."""
        best = f"{float(self.best_score):.4g} of epoch {self.best_epoch + 1}"
        return f"Stopped early after epoch {epoch + 1}: no {self.monitor} better than {best} in {self.wait_count} validations."

    def state_dict(self) -> dict[str, Any]:
        """Plain data and a tensor."""
        own = {"best_epoch": self.best_epoch, "heard_epoch": self._heard_epoch}
        return super().state_dict() | own | {"asked": self._asked, "monitor": self.monitor}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As saved, but for the patience, which may be raised to go on.

        Values of another metric say nothing of this one.
        """
        if state_dict["asked"] != self._asked:
            return
        patience = self.patience
        super().load_state_dict(state_dict)
        self.patience = patience
        self.best_epoch, self._heard_epoch = state_dict["best_epoch"], state_dict["heard_epoch"]
        if state_dict["monitor"] != self.monitor:
            self._follow_loss()


class Trial(Protocol):
    """A run as its search sees it; Optuna's trials are such."""

    def report(self, value: float, step: int) -> None:
        """Takes the objective at a step."""

    def should_prune(self) -> bool:
        """Whether others were better at the last step."""


class TrialPruning(L.Callback):
    """Reports the objective after each validation; stands behind the evaluation in the list of callbacks.

    Args:
        objective: Name of a metric. One that is not measured while training, such as a test score, prunes nothing.
        trial: The run as its search sees it.
    """

    def __init__(self, objective: str, trial: Trial) -> None:
        self._objective, self._trial = objective, trial

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Reports, with the number of epochs as the step.

        Raises:
            TrialPruned: The search has seen enough.
        """
        value = float(trainer.callback_metrics.get(self._objective, math.nan))
        if trainer.sanity_checking or not math.isfinite(value):
            return
        epochs, is_worse = trainer.current_epoch + 1, False
        if trainer.is_global_zero:
            self._trial.report(value, epochs)
            is_last = epochs >= (trainer.max_epochs or 0)  # nothing is saved by then, and a score would be lost
            is_worse = not is_last and self._trial.should_prune()
        if trainer.strategy.broadcast(is_worse):
            raise TrialPruned(
                f"{self._objective} of {value:.4f} after epoch {epochs} is worse than the median of the other trials "
                "there",
                value,
            )
