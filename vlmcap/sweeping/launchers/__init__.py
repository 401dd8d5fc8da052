"""What starts jobs: in this process, in one process a GPU, on Slurm, on Ray."""

from __future__ import annotations

from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from vlmcap.config import LauncherConfig, LauncherKind
from vlmcap.sweeping.launchers.devices import shares, visible_devices
from vlmcap.sweeping.launchers.packing import Packer
from vlmcap.sweeping.runner import Starter


def num_parallel(launcher: LauncherConfig) -> int:
    """Jobs that a search starts at a time."""
    if launcher.kind is LauncherKind.basic:
        return 1
    return len(shares(launcher, visible_devices()))


def batch_size(launcher: LauncherConfig) -> int | None:
    """Jobs that one call of the launcher is given; None is all of them, of which it runs as many at a time as it may."""
    if launcher.kind is LauncherKind.basic:
        return 1  # the line of a job stands in front of what it prints
    return launcher.n_jobs if launcher.kind is LauncherKind.submitit and launcher.is_local else None


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
    packer = Packer(context, task, master)
    if launcher.kind is LauncherKind.joblib:
        from vlmcap.sweeping.launchers.joblib import JoblibLauncher

        return JoblibLauncher(launcher, packer)
    if launcher.kind is LauncherKind.submitit:
        from vlmcap.sweeping.launchers.submitit import SubmititLauncher

        return SubmititLauncher(launcher, packer)
    if launcher.kind is LauncherKind.ray:
        from vlmcap.sweeping.launchers.ray import RayLauncher

        return RayLauncher(launcher, packer)
    from hydra.core.plugins import Plugins

    return Plugins.instance().instantiate_launcher(hydra_context=context, task_function=task, config=master)
