"""Settings of a sweep that Weights & Biases chooses the runs of."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from vlmcap.config.checks import require


class SweepMethod(Enum):
    """How W&B chooses the next run: all combinations, chance, or a model of those before."""

    grid = "grid"
    random = "random"
    bayes = "bayes"


@dataclass
class WandbSweepConfig:
    """What `vlmcap dashboard --sweep` writes for `wandb sweep` beside the values to try."""

    method: SweepMethod = SweepMethod.grid
    max_runs: int | None = None  # of all agents together; null is no limit, and then a grid alone ends by itself

    def __post_init__(self) -> None:
        require(self.max_runs is None or self.max_runs >= 1, f"sweep.wandb.max_runs must be at least 1, or null, not {self.max_runs}")
