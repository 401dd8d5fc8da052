"""Settings of the optimiser and the loop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vlmcap.config.checks import follows, require, require_positive
from vlmcap.config.choices import OptimKind, Strategy


@dataclass
class OptimConfig:
    """AdamW; the rates stand in tuning, a stage each."""

    kind: OptimKind = OptimKind.adamw
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.95
    max_grad_norm: float = 1.0  # gradients are scaled down to it; 0 leaves them as they are

    def __post_init__(self) -> None:
        for name in ("weight_decay", "max_grad_norm"):
            require(getattr(self, name) >= 0, f"optim.{name} must not be negative, and is {getattr(self, name)}")
        for name in ("beta1", "beta2"):
            require(0 <= getattr(self, name) < 1, f"optim.{name} must be in [0, 1), not {getattr(self, name)}")


@dataclass
class TrainerConfig:
    """Lightning's loop."""

    strategy: Strategy = (
        Strategy.auto
    )  # of hardware.devices processes a machine; auto is ddp where there is more than one
    num_nodes: int = 1  # machines; each has hardware.devices
    accumulate_grad_batches: int = follows("hardware.accumulate_grad_batches", 1)
    max_steps: int = -1  # optimiser steps at most; -1 is no limit
    overfit: bool = (
        False  # validate and score on the very clips that are trained on, and on no others; see debug=overfit
    )
    log_every_n_steps: int = 10
    checkpoint_every_n_steps: int | None = None
    # Equal seeds give equal weights, bit for bit: true, false, or auto, which is true on a CPU and false on a GPU,
    # where it costs time.
    deterministic: Any = "auto"
    progress_bar: bool = True
    requeue: bool = (
        False  # go on from the folder's last.ckpt where there is one, and ask Slurm for another turn at its signal USR1
    )
    shrink_on_oom: bool = (
        False  # where memory runs out in the first steps, start again with smaller micro-batches, and more to a step
    )

    def __post_init__(self) -> None:
        require_positive(
            "trainer", self, "num_nodes", "accumulate_grad_batches", "log_every_n_steps", "checkpoint_every_n_steps"
        )
        require(
            self.max_steps == -1 or self.max_steps >= 1,
            f"trainer.max_steps must be at least 1, or -1 for no limit, not {self.max_steps}",
        )
        is_known = self.deterministic == "auto" or isinstance(self.deterministic, bool)
        require(is_known, f"trainer.deterministic must be true, false or auto, not {self.deterministic}")
