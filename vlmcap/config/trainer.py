"""Settings of the optimiser and the training loop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vlmcap.config.checks import follows, require, require_positive
from vlmcap.config.choices import OptimKind, Strategy


@dataclass
class OptimConfig:
    """AdamW; the learning rates are settings of `tuning`."""

    kind: OptimKind = OptimKind.adamw  # kind of AdamW
    weight_decay: float = 0.01  # decoupled weight decay of matrices; vectors have none
    beta1: float = 0.9  # decay of the first moment
    beta2: float = 0.95  # decay of the second moment
    max_grad_norm: float = 1.0  # norm to which gradients are clipped; 0 does not clip

    def __post_init__(self) -> None:
        for name in ("weight_decay", "max_grad_norm"):
            require(getattr(self, name) >= 0, f"optim.{name} must not be negative, not {getattr(self, name)}")
        for name in ("beta1", "beta2"):
            require(0 <= getattr(self, name) < 1, f"optim.{name} must be in [0, 1), not {getattr(self, name)}")


@dataclass
class TrainerConfig:
    """Lightning's training loop."""

    strategy: Strategy = Strategy.auto  # how processes share the model; auto is ddp if there are several devices
    num_nodes: int = 1  # number of machines, each with hardware.devices
    accumulate_grad_batches: int = follows("hardware.accumulate_grad_batches", 1)  # micro-batches per optimiser step
    max_steps: int = -1  # largest number of optimiser steps; -1 is no limit
    overfit: bool = False  # validate and score on the training clips instead of other splits; see debug=overfit
    log_every_n_steps: int = 10  # optimiser steps between log lines
    checkpoint_every_n_steps: int | None = None  # optimiser steps between saves within an epoch; null saves at its end
    # Use deterministic kernels, so that equal seeds give bit-identical weights: true, false, or auto, which is true on
    # a CPU and false on a GPU, where it is slower.
    deterministic: Any = "auto"
    progress_bar: bool = True  # show a progress bar on a terminal
    requeue: bool = False  # resume from the folder's last.ckpt if there is one, and requeue the Slurm job at SIGUSR1
    # Restart with smaller micro-batches and more accumulation if memory runs out in the first steps.
    shrink_on_oom: bool = False

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
