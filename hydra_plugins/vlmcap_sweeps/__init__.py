"""What Hydra finds as the sweeper of `train.py -m`: it takes sweepers from the namespace package `hydra_plugins` alone."""

from __future__ import annotations

from typing import Any

from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class Sweep(Sweeper):
    """Runs a sweep as the group `sweep` of the configuration says it.

    Args:
        max_batch_size: Of Hydra's own sweeper, and not used.
        params: Overrides in front of those of the command line, as of Hydra's own sweeper.
    """

    def __init__(self, max_batch_size: int | None = None, params: dict[str, str] | None = None) -> None:
        self.params = params or {}

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Keeps what jobs are started with."""
        self.hydra_context, self.task_function, self.config = hydra_context, task_function, config

    def sweep(self, arguments: list[str]) -> Any:
        """Runs the jobs that the arguments name, and exits with 1 if one came to nothing."""
        from vlmcap.sweeping.sweep import run_sweep

        given = [f"{key}={value}" for key, value in self.params.items()]
        return run_sweep(self.hydra_context, self.task_function, self.config, [*given, *arguments])
