"""The stages of tuning, and the scheduler that sets their learning rates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from vlmcap.config import Stage
from vlmcap.models.rates import cosine_rate

COMPONENTS = ("encoder", "projector", "adapter", "llm")


@dataclass(frozen=True, slots=True)
class StagePosition:
    """The stage that an epoch belongs to.

    Attributes:
        name: Name of the stage.
        stage: Settings of the stage.
        first_epoch: Epoch at which the stage begins, from 0.
    """

    name: str
    stage: Stage
    first_epoch: int


@dataclass(frozen=True)
class StagePlan:
    """The stages of tuning, one after another.

    Attributes:
        stages: Settings of each stage by name, in order; stages without epochs are skipped.
    """

    stages: Mapping[str, Stage]

    @property
    def num_epochs(self) -> int:
        """Number of epochs of all stages."""
        return sum(stage.epochs for stage in self.stages.values())

    def at_epoch(self, epoch: int) -> StagePosition:
        """Returns the stage that `epoch` belongs to; epochs after the end belong to the last stage."""
        first = 0
        position: StagePosition | None = None
        for name, stage in self.stages.items():
            if stage.epochs == 0:
                continue
            # The last assignment is the last stage with epochs, for epochs after the end.
            position = StagePosition(name, stage, first)
            first += stage.epochs
            if epoch < first:
                break
        assert position is not None, "checked with the configuration"
        return position

    def stage_names(self) -> list[str]:
        """Returns the stage name of each epoch."""
        return [name for name, stage in self.stages.items() for _ in range(stage.epochs)]

    def trained_components(self) -> tuple[str, ...]:
        """Returns the components that have a learning rate above 0 in any stage."""
        return tuple(
            component
            for component in COMPONENTS
            if any(peak_rate(stage, component) > 0 for stage in self.stages.values() if stage.epochs)
        )

    def rate(self, component: str, step: int, steps_per_epoch: int) -> float:
        """Returns the learning rate of a component.

        Args:
            component: One of `COMPONENTS`.
            step: Optimiser step, counted as if every epoch had `steps_per_epoch`.
            steps_per_epoch: Optimiser steps per epoch.
        """
        position = self.at_epoch(step // steps_per_epoch)
        num_steps = position.stage.epochs * steps_per_epoch
        return cosine_rate(
            # Each stage has a warm-up and a decay of its own, counted from its first step.
            step - position.first_epoch * steps_per_epoch,
            num_steps,
            peak=peak_rate(position.stage, component),
            # The last step always belongs to the decay.
            warmup_steps=min(num_steps - 1, round(position.stage.warmup_ratio * num_steps)),
            final_ratio=position.stage.final_lr_ratio,
        )


class StageRates(LRScheduler):
    """Sets the learning rate of each parameter group to the rate of its `component` in a `StagePlan`.

    The scheduler has no state: a rate depends only on the epoch and the step in that epoch, so `begin` sets the rates
    of a new run and of a resumed one. The number of steps in earlier epochs does not matter, because those epochs may
    have had other batch sizes.

    Args:
        optimizer: Optimiser whose groups have a key `component`.
        plan: Training stages and their learning rates.
    """

    def __init__(self, optimizer: Optimizer, plan: StagePlan) -> None:
        self.plan, self.steps_per_epoch = plan, 0
        # The base class calls `step`, with `steps_per_epoch` still 0, so that no rate changes before `begin`.
        super().__init__(optimizer)

    def begin(self, epoch: int, step: int, steps_per_epoch: int) -> None:
        """Sets the rates of the next step.

        Args:
            epoch: Epoch of the next step, from 0.
            step: Optimiser steps already done in that epoch.
            steps_per_epoch: Optimiser steps per epoch; unknown earlier, because Lightning creates schedulers before
                loaders.
        """
        self.steps_per_epoch = steps_per_epoch
        # The total is computed with this run's steps per epoch, also for epochs that were trained with another number.
        self.step(epoch * steps_per_epoch + step)

    @property
    def steps_left(self) -> int:
        """Optimiser steps until the end of the last stage."""
        return self.plan.num_epochs * self.steps_per_epoch - self.last_epoch

    def step(self, epoch: int | None = None) -> None:
        """Advances to the next step, or to the step `epoch` (torch's name for it).

        This replaces torch's method, which warns if the optimiser has not stepped; the float16 scaler skips the first
        steps.
        """
        self.last_epoch = self.last_epoch + 1 if epoch is None else epoch
        self._last_lr = self.get_lr()
        for group, rate in zip(self.optimizer.param_groups, self._last_lr, strict=True):
            group["lr"] = rate

    def get_lr(self) -> list[Any]:
        """Returns the rates of the next step; before `begin`, the rates of the optimiser."""
        groups = self.optimizer.param_groups
        # Called by the base class's constructor.
        if self.steps_per_epoch == 0:
            return [group["lr"] for group in groups]
        return [self.plan.rate(group["component"], self.last_epoch, self.steps_per_epoch) for group in groups]

    def state_dict(self) -> dict[str, Any]:
        """Returns an empty state, so that checkpoints hold no plan."""
        return {}


def peak_rate(stage: Stage, component: str) -> float:
    """Returns the configured learning rate of a component in a stage; 0 if it is frozen."""
    return {
        "encoder": stage.encoder_lr,
        "projector": stage.projector_lr,
        "adapter": stage.adapter_lr,
        "llm": stage.llm_lr,
    }[component]
