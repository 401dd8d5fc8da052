"""Learning rates as a function of the step alone, so that a resumed run needs no schedule state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from vlmcap.config import StageConfig
from vlmcap.models.rates import cosine_rate

PARTS = ("encoder", "projector", "adapter", "llm")


@dataclass(frozen=True, slots=True)
class StagePosition:
    """Where an epoch stands: its stage, the stage's name, and the epoch at which the stage begins."""

    name: str
    stage: StageConfig
    first_epoch: int


@dataclass(frozen=True)
class StagePlan:
    """Stages of tuning, one after another.

    Attributes:
        stages: Name to settings, in order; those without epochs are passed over.
    """

    stages: Mapping[str, StageConfig]

    @property
    def num_epochs(self) -> int:
        """Epochs of all stages."""
        return sum(stage.epochs for stage in self.stages.values())

    def at_epoch(self, epoch: int) -> StagePosition:
        """The stage that `epoch` belongs to; the last one from its end on."""
        first = 0
        position: StagePosition | None = None
        for name, stage in self.stages.items():
            if stage.epochs == 0:
                continue
            position = StagePosition(name, stage, first)
            first += stage.epochs
            if epoch < first:
                break
        assert position is not None, "checked with the configuration"
        return position

    def trained_parts(self) -> tuple[str, ...]:
        """Parts with a rate above 0 in any stage."""
        return tuple(part for part in PARTS if any(peak_rate(stage, part) > 0 for stage in self.stages.values() if stage.epochs))

    def rate(self, part: str, step: int, steps_per_epoch: int) -> float:
        """The learning rate of `part` at an optimiser step."""
        position = self.at_epoch(step // steps_per_epoch)
        num_steps = position.stage.epochs * steps_per_epoch
        return cosine_rate(
            step - position.first_epoch * steps_per_epoch,
            num_steps,
            peak=peak_rate(position.stage, part),
            warmup_steps=min(num_steps - 1, round(position.stage.warmup_ratio * num_steps)),  # the last step is at the end of the decay
            final_ratio=position.stage.final_lr_ratio,
        )


def peak_rate(stage: StageConfig, part: str) -> float:
    """The configured rate of a part in a stage; 0 where it is frozen."""
    return {"encoder": stage.encoder_lr, "projector": stage.projector_lr, "adapter": stage.adapter_lr, "llm": stage.llm_lr}[part]
