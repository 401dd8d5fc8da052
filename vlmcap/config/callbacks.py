"""Settings of what a run does beside training, scoring and saving."""

from __future__ import annotations

from dataclasses import dataclass, field

from vlmcap.config.checks import require, require_positive
from vlmcap.config.grounding import GroundingConfig


@dataclass
class ProfileConfig:
    """Where a step's time goes; steps are optimiser steps of this process, a resumed one starts again at 1."""

    enabled: bool = False
    first_step: int = 5  # those before are slower: memory is taken, kernels are chosen
    num_steps: int = 20  # that are timed
    trace_steps: int = 2  # that follow and go into the trace, which slows them; 0 for no trace

    def __post_init__(self) -> None:
        require_positive("callbacks.profile", self, "first_step", "num_steps")
        require(self.trace_steps >= 0, f"callbacks.profile.trace_steps must not be negative, and is {self.trace_steps}; 0 writes no trace")


@dataclass
class CallbacksConfig:
    """What a run does beside training, scoring and saving."""

    profile: ProfileConfig = field(default_factory=ProfileConfig)
    grounding: GroundingConfig = field(default_factory=GroundingConfig)
