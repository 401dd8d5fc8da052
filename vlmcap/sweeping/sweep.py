"""`python train.py -m`: a whole sweep, from its arguments to the table of what became of its jobs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from vlmcap.compose import write_yaml
from vlmcap.config import LauncherConfig, SweepConfig, SweepKind
from vlmcap.errors import UserError
from vlmcap.sweeping.composing import Composer, check_arguments
from vlmcap.sweeping.halving import Halving
from vlmcap.sweeping.launchers import batch_size, make_launcher, num_parallel
from vlmcap.sweeping.runner import Done, Runner
from vlmcap.sweeping.search import Search
from vlmcap.sweeping.search_space import read_space
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
    runner = Runner(folder, starter, is_resumed=sweep.resume, batch_size=batch_size(launcher))
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
    if sweep.kind is SweepKind.optuna:
        space = read_space(composer.parse(arguments))
        check_arguments(arguments, [*space.distributions])
        search = Search(sweep, space, composer, runner, master.objective_mode, num_parallel(launcher))
        keep_arguments(master, runner.folder)
        search.run()
        return
    jobs = composer.grid(arguments)
    halving = Halving(sweep, composer, runner, _objective(master)) if sweep.kind is SweepKind.halving else None
    if halving is not None:
        halving.check(jobs)
    keep_arguments(master, runner.folder)
    if halving is not None:
        halving.run(jobs)
    else:
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
