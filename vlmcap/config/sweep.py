"""Settings of a sweep."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

from vlmcap.config.checks import require


@dataclass
class SweepConfig:
    """A sweep as a whole, which `python train.py -m` runs and `vlmcap plan -m` adds up."""

    budget_h: float | None = None  # hours of the card that the plan holds it to; null is no limit

    def __post_init__(self) -> None:
        is_hours = self.budget_h is None or 0 < self.budget_h < inf
        require(is_hours, f"sweep.budget_h must be above 0 hours, or null for no limit, not {self.budget_h}")
