"""Settings of optional callbacks: visual reliance, profiling, early stopping and the divergence guard."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from vlmcap.config.checks import only_with, require, require_positive
from vlmcap.config.choices import VisualRelianceMode


def _if_enabled(default: Any) -> Any:
    return only_with("enabled=true", lambda values: values.enabled, default)


@dataclass
class VisualRelianceConfig:
    """Measures whether captions depend on the video: validates again with exchanged videos and with black ones."""

    enabled: bool = False  # whether to measure visual reliance
    # Scores that are compared: captions and label loss, or loss alone, which is much faster.
    mode: VisualRelianceMode = _if_enabled(VisualRelianceMode.captions)
    max_clips: int = _if_enabled(64)  # first clips of the split that are used; in training at most evaluation.max_clips
    # Validations between two measurements in training; every split that is scored at the end is measured in any case.
    every_n_validations: int = _if_enabled(1)

    def __post_init__(self) -> None:
        require_positive("callbacks.visual_reliance", self, "max_clips", "every_n_validations")


@dataclass
class ProfileConfig:
    """Measures where the time of a step goes; steps are optimiser steps of this process, from 1."""

    enabled: bool = False  # whether to profile training
    first_step: int = _if_enabled(5)  # first timed step; earlier ones allocate memory and choose kernels
    num_steps: int = _if_enabled(20)  # number of timed steps
    trace_steps: int = _if_enabled(2)  # steps after these that are traced, which slows them; 0 writes no trace

    def __post_init__(self) -> None:
        require_positive("callbacks.profile", self, "first_step", "num_steps")
        require(
            self.trace_steps >= 0,
            f"callbacks.profile.trace_steps must not be negative, not {self.trace_steps}; 0 writes no trace",
        )


@dataclass
class EarlyStoppingConfig:
    """Stops training when `monitor` no longer improves; only the last stage can stop early."""

    enabled: bool = False  # whether to stop early
    patience: int = _if_enabled(3)  # validations without improvement before the run stops
    min_delta: float = _if_enabled(0.0)  # smallest difference that counts as an improvement

    def __post_init__(self) -> None:
        require_positive("callbacks.early_stopping", self, "patience")
        require(self.min_delta >= 0, f"callbacks.early_stopping.min_delta must not be negative, not {self.min_delta}")


@dataclass
class GuardConfig:
    """Stops a run that diverges, by a loss or gradient that is not finite or by a high loss, before it is saved."""

    enabled: bool = True  # whether to stop diverging runs
    factor: float = _if_enabled(2.0)  # a loss is too high above this multiple of the best loss and 1 nat more than it
    window: int = _if_enabled(50)  # optimiser steps in a row with too high a loss before the run stops
    # Steps in a row that the float16 scaler may skip; single ones are normal, as it searches for a scale.
    fp16_skips: int = _if_enabled(20)

    def __post_init__(self) -> None:
        require_positive("callbacks.guard", self, "window", "fp16_skips")
        require(
            self.factor > 1, f"callbacks.guard.factor multiplies the best loss and must be above 1, not {self.factor}"
        )


@dataclass
class CallbacksConfig:
    """Optional callbacks of a run."""

    profile: ProfileConfig = field(default_factory=ProfileConfig)
    visual_reliance: VisualRelianceConfig = field(default_factory=VisualRelianceConfig)
    early_stopping: EarlyStoppingConfig = field(default_factory=EarlyStoppingConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    # Further Lightning callbacks of training: {_target_: dotted.Class, argument: value}.
    extra: list[dict[str, Any]] = field(default_factory=list)
