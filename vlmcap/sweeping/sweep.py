"""`python train.py -m`: a whole sweep, from its arguments to the table of what became of its jobs."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from vlmcap.compose import write_yaml
from vlmcap.config import HalvingSweepConfig, LauncherConfig, OptunaSweepConfig, SweepConfig, mode_of
from vlmcap.config.kinds import schema_of
from vlmcap.errors import UserError
from vlmcap.locks import claimed_folder
from vlmcap.sweeping.composing import Composer, check_arguments
from vlmcap.sweeping.halving import Halving
from vlmcap.sweeping.job import FINISHED
from vlmcap.sweeping.launchers import batch_size, make_launcher, num_parallel
from vlmcap.sweeping.runner import Done, Runner
from vlmcap.sweeping.search import Search, read_space


def run_sweep(context: HydraContext, task: TaskFunction, master: DictConfig, arguments: Sequence[str]) -> list[Done]:
    """Runs the jobs that the arguments name, in a folder of their own, and shows what became of them.

    Args:
        context: Hydra's.
        task: What a job does.
        master: The configuration of the program around the jobs.
        arguments: As after `python train.py -m`.

    Raises:
        InUseError: Another sweep runs in the folder.
        UserError: Something holds for no job, and nothing was made.
        SystemExit: With 1, at the end, where a job came to nothing.
    """
    sweep, launcher = _settings(master, "sweep", SweepConfig), _settings(master, "launcher", LauncherConfig)
    folder = Path(sweep.folder or master.hydra.sweep.dir).resolve()
    composer = Composer(context, master)
    starter = make_launcher(launcher, context, task, master)
    with claimed_folder(folder, "sweep.folder"):
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
    sweep: SweepConfig,
    launcher: LauncherConfig,
    composer: Composer,
    runner: Runner,
    arguments: Sequence[str],
    master: DictConfig,
) -> None:
    if isinstance(sweep, OptunaSweepConfig):
        space = read_space(composer.parse(arguments))
        check_arguments(arguments, [*space.distributions])
        search = Search(sweep, space, composer, runner, _objective(master)[1], num_parallel(launcher))
        keep_arguments(master, runner.folder)
        search.run()
        return
    jobs = composer.grid(arguments)
    halving = Halving(sweep, composer, runner, _objective(master)) if isinstance(sweep, HalvingSweepConfig) else None
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
    return master.monitor, mode_of(master.monitor, master.mode)


def _settings(master: DictConfig, group: str, schema: type[Any]) -> Any:
    try:
        typed = OmegaConf.structured(schema_of(group, master[group].kind))
        found = OmegaConf.to_object(OmegaConf.merge(typed, OmegaConf.to_container(master[group], resolve=True)))
    except ValueError as error:
        raise UserError(str(error)) from error
    assert isinstance(found, schema)
    return found


def show_sweep(done: Sequence[Done], folder: Path, objective: tuple[str, str], *, is_interrupted: bool = False) -> None:
    """Prints every job with its status, objective and time, the best one, and the commands that go on from here.

    Args:
        done: In any order; of a folder that is there twice the last counts.
        folder: Of the sweep.
        objective: Its name, and `max` or `min`.
        is_interrupted: Whether jobs are left.
    """
    from rich.console import Console
    from rich.table import Table

    rows = sorted({one.number: one for one in done}.values(), key=lambda one: one.number)
    best = best_of(rows, objective[1])
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("job", "what differs", "status", objective[0], "min", "reason"):
        table.add_column(name, justify="right" if name in ("job", objective[0], "min") else "left", overflow="fold")
    for one in rows:
        status = one.status
        value = "" if status.objective is None else f"{status.objective:.4f}"
        word = status.status if one.is_new else f"{status.status} before"
        reason = status.reason + _plan(one)
        style = "bold" if one is best else "red" if one.is_failure else None
        table.add_row(str(one.number), one.job.name, word, value, f"{status.seconds / 60:.1f}", reason, style=style)
    Console(width=None if os.isatty(1) else 160, soft_wrap=False).print(table)
    if best is not None:
        print(f"Best {objective[0]}: {best.status.objective:.4f}, job {best.number}, {best.job.name}")
    failures = sum(one.is_failure for one in rows)
    if failures:
        print(f"{failures} of {len(rows)} came to nothing; status.json in their folders says why.")
    shown = shlex.quote(_shown(folder))
    if is_interrupted or failures:
        print(
            f"To go on, or try again what came to nothing: the same command with sweep.resume=true sweep.folder={shown}"
        )
    print(f"To compare them: vlmcap report {shown}", flush=True)


def best_of(done: Sequence[Done], mode: str) -> Done | None:
    """The finished job with the best objective."""
    sign = -1.0 if mode == "min" else 1.0
    scored = [
        (sign * one.status.objective, one)
        for one in done
        if one.status.status == FINISHED and one.status.objective is not None
    ]
    return max(scored, key=lambda pair: pair[0])[1] if scored else None


def _plan(one: Done) -> str:
    plan = one.status.plan
    if not plan or "GiB" in one.status.reason:
        return ""
    return f" (planned {plan['peak_gib']:.1f} GiB of {plan['usable_gib']:.1f})"


def _shown(folder: Path) -> str:
    return str(folder.relative_to(Path.cwd())) if folder.is_relative_to(Path.cwd()) else str(folder)
