"""Plugins that Hydra finds in its namespace package `hydra_plugins`.

They are the sweeper of `train.py -m`, and the configuration search path with the folder of `--config-dir`.
"""

from __future__ import annotations

from typing import Any

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class UserConfigDir(SearchPathPlugin):
    """Puts the folder of `--config-dir` before the built-in one."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Adds the user's folders of configuration files to the search path."""
        from vlmcap.config_files import config_dirs

        for folder in reversed(config_dirs()[:-1]):
            search_path.prepend("--config-dir", f"file://{folder}")


class Sweep(Sweeper):
    """Runs a sweep with the settings in the group `sweep` of the configuration.

    Args:
        max_batch_size: Argument of Hydra's basic sweeper; not used.
        params: Overrides that precede those of the command line, like those of Hydra's basic sweeper.
    """

    def __init__(self, max_batch_size: int | None = None, params: dict[str, str] | None = None) -> None:
        self.params = params or {}

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Stores the context, the task and the configuration that jobs are started with."""
        self.hydra_context, self.task_function, self.config = hydra_context, task_function, config

    def sweep(self, arguments: list[str]) -> Any:
        """Runs the jobs that the arguments describe; exits with code 1 if one of them gives no result."""
        from vlmcap.overrides import read_overrides
        from vlmcap.sweeping.sweep import run_sweep

        given = read_overrides([f"{key}={value}" for key, value in self.params.items()], is_sweep=True)
        return run_sweep(self.hydra_context, self.task_function, self.config, [*given, *arguments])
