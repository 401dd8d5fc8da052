"""A search hears of every validation, and ends a run that is worse, unless the run is at its end anyway."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vlmcap.errors import Pruned
from vlmcap.training.callbacks.stopping import TrialPruning


class Worse:
    """A trial that is always worse than the others."""

    def __init__(self) -> None:
        self.reports: list[tuple[float, int]] = []

    def report(self, value: float, step: int) -> None:
        self.reports.append((value, step))

    def should_prune(self) -> bool:
        return True


def validate(trial: Worse, epoch: int, scores: dict[str, float]) -> None:
    strategy = SimpleNamespace(broadcast=lambda value: value)
    metrics = {name: torch.tensor(value, dtype=torch.float64) for name, value in scores.items()}
    trainer: Any = SimpleNamespace(
        sanity_checking=False, current_epoch=epoch, is_global_zero=True, max_epochs=3, strategy=strategy, callback_metrics=metrics
    )
    TrialPruning("val/cider", trial).on_validation_epoch_end(trainer, None)  # type: ignore[arg-type]


def test_a_worse_run_ends_before_its_last_epoch_alone() -> None:
    trial = Worse()
    with pytest.raises(Pruned, match=r"val/cider of 0\.5000 after epoch 2 is worse than the median"):
        validate(trial, 1, {"val/cider": 0.5})
    validate(trial, 2, {"val/cider": 0.6})
    assert trial.reports == [(0.5, 2), (0.6, 3)]


@pytest.mark.parametrize("scores", [{}, {"val/cider": float("nan")}, {"val/loss": 1.0}])
def test_what_is_not_measured_ends_nothing(scores: dict[str, float]) -> None:
    trial = Worse()
    validate(trial, 0, scores)
    assert not trial.reports
