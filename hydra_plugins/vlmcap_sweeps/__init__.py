"""What Hydra looks for in the namespace package `hydra_plugins`.

The sweeper of `train.py -m`, and the folder of `--config-dir`.
"""

from __future__ import annotations

from typing import Any

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class OwnConfigDir(SearchPathPlugin):
    """Puts the folder of `--config-dir` in front of ours."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Adds it, where there is one."""
        from vlmcap.config_files import config_dirs

        for folder in reversed(config_dirs()[:-1]):
            search_path.prepend("--config-dir", f"file://{folder}")


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
        from vlmcap.overrides import read_overrides
        from vlmcap.sweeping.sweep import run_sweep

        given = read_overrides([f"{key}={value}" for key, value in self.params.items()], is_sweep=True)
        return run_sweep(self.hydra_context, self.task_function, self.config, [*given, *arguments])
