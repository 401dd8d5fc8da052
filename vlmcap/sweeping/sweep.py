"""`python train.py -m`: a whole sweep, from its arguments to the table of what became of its jobs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from vlmcap.compose import write_yaml
from vlmcap.config import LauncherConfig, LauncherKind, SweepConfig
from vlmcap.errors import UserError
from vlmcap.sweeping.composing import Composer
from vlmcap.sweeping.launchers import make_launcher
from vlmcap.sweeping.runner import Done, Runner
from vlmcap.sweeping.table import show_sweep


def run_sweep(context: HydraContext, task: TaskFunction, master: DictConfig, arguments: Sequence[str]) -> list[Done]:
    """Runs the jobs that the arguments name, in a folder of their own, and shows what became of them.

    Args:
        context: Hydra's.
        task: What a job does.
        master: The configuration of the program around the jobs.
        arguments: As after `python train.py -m`.

    Raises:
        UserError: Something holds for no job, and nothing was made.
        SystemExit: With 1, at the end, where a job came to nothing.
    """
    sweep, launcher = _settings(master, "sweep", SweepConfig), _settings(master, "launcher", LauncherConfig)
    folder = Path(sweep.folder or master.hydra.sweep.dir).resolve()
    composer = Composer(context, master)
    starter = make_launcher(launcher, context, task, master)
    runner = Runner(folder, starter, is_resumed=sweep.resume, is_serial=launcher.kind is LauncherKind.basic)
    try:
        _run(sweep, launcher, composer, runner, arguments, master)
    except (KeyboardInterrupt, SystemExit):
        if runner.done:
            show_sweep(runner.done, folder, _objective(master), is_interrupted=True)
        raise
    show_sweep(runner.done, folder, _objective(master))
    if any(one.is_failure for one in runner.done):
        raise SystemExit(1)
    return runner.done


def _run(
    sweep: SweepConfig, launcher: LauncherConfig, composer: Composer, runner: Runner, arguments: Sequence[str], master: DictConfig
) -> None:
    jobs = composer.grid(arguments)
    keep_arguments(master, runner.folder)
    runner.run(jobs)


def keep_arguments(master: DictConfig, folder: Path) -> None:
    """Writes `multirun.yaml`, as Hydra's own sweeper does; the folder is made with it."""
    folder.mkdir(parents=True, exist_ok=True)
    write_yaml(OmegaConf.to_container(master, resolve=False), folder / "multirun.yaml")


def _objective(master: DictConfig) -> tuple[str, str]:
    return master.objective, master.objective_mode


def _settings(master: DictConfig, group: str, schema: type[Any]) -> Any:
    try:
        found = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), OmegaConf.to_container(master[group], resolve=True)))
    except ValueError as error:
        raise UserError(str(error)) from error
    assert isinstance(found, schema)
    return found
