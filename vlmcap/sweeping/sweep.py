"""`python train.py -m`: runs a whole sweep, from its arguments to the table of its results."""

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
from vlmcap.sweeping.halving import Halving, best_jobs
from vlmcap.sweeping.job import Status
from vlmcap.sweeping.launchers import batch_size, make_launcher, num_parallel
from vlmcap.sweeping.runner import JobResult, Runner
from vlmcap.sweeping.search import Search, read_space


def run_sweep(
    context: HydraContext, task: TaskFunction, master: DictConfig, arguments: Sequence[str]
) -> list[JobResult]:
    """Runs a sweep in a folder of its own and prints its results.

    Args:
        context: Hydra context.
        task: Function that runs a job.
        master: Configuration of the sweep's own program.
        arguments: Arguments as after `python train.py -m`.

    Raises:
        InUseError: Another sweep runs in the folder.
        UserError: No job can be run; nothing has been written.
        SystemExit: With code 1, at the end, if a job gave no result.
    """
    # Only the groups of the sweep are resolved here; the rest may have interpolations that need a job.
    sweep, launcher = _settings(master, "sweep", SweepConfig), _settings(master, "launcher", LauncherConfig)
    folder = Path(sweep.folder or master.hydra.sweep.dir).resolve()
    composer = Composer(context, master)
    # Before the folder is claimed, so that a missing library leaves no trace.
    job_launcher = make_launcher(launcher, context, task, master)
    with claimed_folder(folder, "sweep.folder"):
        runner = Runner(folder, job_launcher, is_resumed=sweep.resume, batch_size=batch_size(launcher))
        try:
            _run(sweep, launcher, composer, runner, arguments, master)
        except (KeyboardInterrupt, SystemExit):
            # An interrupted sweep prints what it has.
            if runner.results:
                show_sweep(runner.results, folder, _objective(master), is_interrupted=True)
            raise
    show_sweep(runner.results, folder, _objective(master))
    # The exit code tells a script that some job gave no result.
    if any(result.is_failure for result in runner.results):
        raise SystemExit(1)
    return runner.results


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
        # The study is opened, and every probe composed, before `multirun.yaml` is written.
        trials = Search(sweep, space, composer, runner, _objective(master)[1], num_parallel(launcher))
        write_arguments(master, runner.folder)
        trials.run()
        return
    jobs = composer.grid(arguments)
    search: Halving | Runner = runner
    if isinstance(sweep, HalvingSweepConfig):
        search = Halving(sweep, composer, runner, _objective(master))
        search.check(jobs)
    write_arguments(master, runner.folder)
    search.run(jobs)


def write_arguments(master: DictConfig, folder: Path) -> None:
    """Creates the folder of a sweep and writes `multirun.yaml`, like Hydra's own sweeper."""
    folder.mkdir(parents=True, exist_ok=True)
    write_yaml(OmegaConf.to_container(master, resolve=False), folder / "multirun.yaml")


def _objective(master: DictConfig) -> tuple[str, str]:
    return master.monitor, mode_of(master.monitor, master.mode)


def _settings(master: DictConfig, group: str, schema: type[Any]) -> Any:
    try:
        typed = OmegaConf.structured(schema_of(group, master[group].kind))
        settings = OmegaConf.to_object(OmegaConf.merge(typed, OmegaConf.to_container(master[group], resolve=True)))
    except ValueError as error:
        raise UserError(str(error)) from error
    assert isinstance(settings, schema)
    return settings


def show_sweep(
    results: Sequence[JobResult], folder: Path, objective: tuple[str, str], *, is_interrupted: bool = False
) -> None:
    """Prints a table of all jobs, the best one, and the commands that resume and compare them.

    Args:
        results: Results in any order; if a job occurs twice, the last result counts.
        folder: Folder of the sweep.
        objective: Name of the objective, and `max` or `min`.
        is_interrupted: Whether the sweep was interrupted before its last job.
    """
    from rich.console import Console
    from rich.table import Table

    # A resumed or halved sweep may have several results of one job.
    # The dictionary keeps the last result of each number.
    rows = sorted({result.number: result for result in results}.values(), key=lambda result: result.number)
    best = next((rows[index] for index in best_jobs(rows, 1, objective[1])), None)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("job", "overrides", "status", objective[0], "min", "reason"):
        table.add_column(name, justify="right" if name in ("job", objective[0], "min") else "left", overflow="fold")
    for result in rows:
        status = result.status
        value = "" if status.objective is None else f"{status.objective:.4f}"
        word = status.status if result.is_new else f"already {status.status}"
        reason = status.reason + _planned_memory(status)
        style = "bold" if result is best else "red" if result.is_failure else None
        minutes = f"{status.seconds / 60:.1f}"
        table.add_row(str(result.number), result.job.name, word, value, minutes, reason, style=style)
    # A wide table in a log file, and the width of the terminal otherwise.
    Console(width=None if os.isatty(1) else 160, soft_wrap=False).print(table)
    if best is not None:
        print(f"Best {objective[0]}: {best.status.objective:.4f}, job {best.number}, {best.job.name}")
    failures = sum(result.is_failure for result in rows)
    if failures:
        print(f"{failures} of {len(rows)} jobs gave no result; see status.json in their folders.")
    shown = shlex.quote(_shown(folder))
    if is_interrupted or failures:
        print(
            "To continue the sweep and retry these jobs, run the same command with "
            f"sweep.resume=true sweep.folder={shown}"
        )
    print(f"To compare the runs: vlmcap report {shown}", flush=True)


def _planned_memory(status: Status) -> str:
    plan = status.plan
    # The reason of a run that did not fit already names the sizes.
    if not plan or "GiB" in status.reason:
        return ""
    return f" (planned {plan['peak_gib']:.1f} GiB of {plan['usable_gib']:.1f})"


def _shown(folder: Path) -> str:
    return str(folder.relative_to(Path.cwd())) if folder.is_relative_to(Path.cwd()) else str(folder)
