"""What starts jobs: in this process, in one process a GPU, on Slurm, on Ray."""

from __future__ import annotations

from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from vlmcap.config import LauncherConfig
from vlmcap.sweeping.runner import Starter


def num_parallel(launcher: LauncherConfig) -> int:
    """Jobs that run at a time."""
    return launcher.n_jobs or 1


def make_launcher(launcher: LauncherConfig, context: HydraContext, task: TaskFunction, master: DictConfig) -> Starter:
    """The launcher of a configuration.

    Args:
        launcher: Which, and with what.
        context: Hydra's.
        task: What a job does.
        master: The configuration of the program around the jobs.

    Raises:
        UserError: Its extra is not installed.
    """
    from hydra.core.plugins import Plugins

    return Plugins.instance().instantiate_launcher(hydra_context=context, task_function=task, config=master)
