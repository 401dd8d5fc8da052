"""Learning rates as a function of the place in the stages.

The stages of tuning, and the scheduler that follows them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from vlmcap.config import Stage
from vlmcap.models.rates import cosine_rate

PARTS = ("encoder", "projector", "adapter", "llm")


@dataclass(frozen=True, slots=True)
class StagePosition:
    """Where an epoch stands: its stage, the stage's name, and the epoch at which the stage begins."""

    name: str
    stage: Stage
    first_epoch: int


@dataclass(frozen=True)
class StagePlan:
    """Stages of tuning, one after another.

    Attributes:
        stages: Name to settings, in order; those without epochs are passed over.
    """

    stages: Mapping[str, Stage]

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

    def stage_names(self) -> list[str]:
        """The name of the stage of each epoch."""
        return [name for name, stage in self.stages.items() for _ in range(stage.epochs)]

    def trained_parts(self) -> tuple[str, ...]:
        """Parts with a rate above 0 in any stage."""
        return tuple(
            part for part in PARTS if any(peak_rate(stage, part) > 0 for stage in self.stages.values() if stage.epochs)
        )

    def rate(self, part: str, step: int, steps_per_epoch: int) -> float:
        """The learning rate of `part` at an optimiser step, counted as if all epochs had had `steps_per_epoch`."""
        position = self.at_epoch(step // steps_per_epoch)
        num_steps = position.stage.epochs * steps_per_epoch
        return cosine_rate(
            step - position.first_epoch * steps_per_epoch,
            num_steps,
            peak=peak_rate(position.stage, part),
            warmup_steps=min(
                num_steps - 1, round(position.stage.warmup_ratio * num_steps)
            ),  # the last step is at the end of the decay
            final_ratio=position.stage.final_lr_ratio,
        )


class StageRates(LRScheduler):
    """Gives each parameter group the rate that a `StagePlan` has for its `part`, one optimiser step after another.

    Its state is empty: a rate depends on nothing but the place in the stages, so `begin` sets those of a fresh and of a
    resumed run. A place is an epoch and a step in it. The steps of earlier epochs do not count, as those may have had
    other batches.

    Args:
        optimizer: Each of its groups has a `part`.
        plan: Stages and rates.
    """

    def __init__(self, optimizer: Optimizer, plan: StagePlan) -> None:
        self.plan, self.steps_per_epoch = plan, 0
        super().__init__(optimizer)

    def begin(self, epoch: int, step: int, steps_per_epoch: int) -> None:
        """Sets the rates of the step to come.

        Args:
            epoch: Epoch of the step to come, from 0.
            step: Optimiser steps already done in it.
            steps_per_epoch: Optimiser steps of an epoch; not known before, as Lightning makes schedulers before
                loaders.
        """
        self.steps_per_epoch = steps_per_epoch
        self.step(epoch * steps_per_epoch + step)

    @property
    def steps_left(self) -> int:
        """Optimiser steps to the end of the last stage."""
        return self.plan.num_epochs * self.steps_per_epoch - self.last_epoch

    def step(self, epoch: int | None = None) -> None:
        """Goes to the next step, or to `epoch`, as torch calls a step.

        torch's own method warns where the optimiser has not stepped, as in float16, whose scaler skips the first steps.
        """
        self.last_epoch = self.last_epoch + 1 if epoch is None else epoch
        self._last_lr = self.get_lr()
        for group, rate in zip(self.optimizer.param_groups, self._last_lr, strict=True):
            group["lr"] = rate

    def get_lr(self) -> list[Any]:
        """The rates of the step to come; the optimiser's own before `begin`."""
        groups = self.optimizer.param_groups
        if self.steps_per_epoch == 0:
            return [group["lr"] for group in groups]
        return [self.plan.rate(group["part"], self.last_epoch, self.steps_per_epoch) for group in groups]

    def state_dict(self) -> dict[str, Any]:
        """Nothing, so that a checkpoint holds no plan."""
        return {}


def peak_rate(stage: Stage, part: str) -> float:
    """The configured rate of a part in a stage; 0 where it is frozen."""
    return {
        "encoder": stage.encoder_lr,
        "projector": stage.projector_lr,
        "adapter": stage.adapter_lr,
        "llm": stage.llm_lr,
    }[part]
