"""Settings of what a run does beside training, scoring and saving."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from vlmcap.config.checks import only_with, require, require_positive
from vlmcap.config.choices import VisualRelianceMode


def _if_enabled(default: Any) -> Any:
    return only_with("enabled=true", lambda values: values.enabled, default)


@dataclass
class VisualRelianceConfig:
    """Whether captions depend on the video.

    Validation again with the videos exchanged between clips, and with black ones.
    """

    enabled: bool = False
    mode: VisualRelianceMode = _if_enabled(
        VisualRelianceMode.captions
    )  # loss: label loss alone; no captions are written, which is what takes long
    max_clips: int = _if_enabled(64)  # the first ones of the split; while training, at most evaluation.max_clips
    every_n_validations: int = _if_enabled(
        1
    )  # while training; every split that is scored at the end is measured there too

    def __post_init__(self) -> None:
        require_positive("callbacks.visual_reliance", self, "max_clips", "every_n_validations")


@dataclass
class ProfileConfig:
    """Where a step's time goes; steps are optimiser steps of this process, a resumed one starts again at 1."""

    enabled: bool = False
    first_step: int = _if_enabled(5)  # those before are slower: memory is taken, kernels are chosen
    num_steps: int = _if_enabled(20)  # that are timed
    trace_steps: int = _if_enabled(2)  # that follow and go into the trace, which slows them; 0 for no trace

    def __post_init__(self) -> None:
        require_positive("callbacks.profile", self, "first_step", "num_steps")
        require(
            self.trace_steps >= 0,
            f"callbacks.profile.trace_steps must not be negative, and is {self.trace_steps}; 0 writes no trace",
        )


@dataclass
class EarlyStoppingConfig:
    """An end of training once `monitor` gets no better.

    Counted in the last stage alone, the others train to their ends.
    """

    enabled: bool = False
    patience: int = _if_enabled(3)  # validations without a better value
    min_delta: float = _if_enabled(0.0)  # by which a value must be better to count

    def __post_init__(self) -> None:
        require_positive("callbacks.early_stopping", self, "patience")
        require(
            self.min_delta >= 0, f"callbacks.early_stopping.min_delta must not be negative, and is {self.min_delta}"
        )


@dataclass
class GuardConfig:
    """The end of a run that has gone wrong, before its checkpoints.

    A loss or gradient that is no number, or a loss that ran off.
    """

    enabled: bool = True
    factor: float = _if_enabled(2.0)  # times the best loss so far, and 1 nat above it, is too high
    window: int = _if_enabled(50)  # optimiser steps in a row with a loss that is too high
    fp16_skips: int = _if_enabled(
        20
    )  # steps in a row that the scaler of float16 may skip; single ones are its way to find a scale

    def __post_init__(self) -> None:
        require_positive("callbacks.guard", self, "window", "fp16_skips")
        require(
            self.factor > 1, f"callbacks.guard.factor must be above 1, not {self.factor}: it multiplies the best loss"
        )


@dataclass
class CallbacksConfig:
    """What a run does beside training, scoring and saving."""

    profile: ProfileConfig = field(default_factory=ProfileConfig)
    visual_reliance: VisualRelianceConfig = field(default_factory=VisualRelianceConfig)
    early_stopping: EarlyStoppingConfig = field(default_factory=EarlyStoppingConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    extra: list[dict[str, Any]] = field(
        default_factory=list
    )  # Lightning callbacks of training: {_target_: dotted.Class, argument: value}
