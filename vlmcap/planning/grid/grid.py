"""`vlmcap plan --grid`: encoders × language models × hardware, each part traced once."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from vlmcap.errors import UserError
from vlmcap.planning.estimate.quick_traces import QuickTracer
from vlmcap.planning.grid.configs import GridConfigs, GridNames, cells
from vlmcap.planning.make import make_plan, planned_card

if TYPE_CHECKING:
    from vlmcap.config import Config
    from vlmcap.planning.grid.table import Cell

Advance = Callable[[int, int], Any]
"""Told the steps done and all steps."""

_MOST_PROCESSES = 8
_configs: GridConfigs | None = None  # what a forked process finds


def make_grid(
    names: GridNames, *, num_processes: int | None = None, advance: Callable[[int, int], Any] = lambda done, total: None
) -> list[Cell]:
    """Every cell of the table; Ctrl-C leaves the traces that were made.

    Args:
        names: Of the table.
        num_processes: That trace; None takes the processors that there are.
        advance: Told how far it is.

    Raises:
        UserError: An override is wrong.
    """
    global _configs
    _configs = GridConfigs(names)
    try:
        jobs = _jobs(names, _configs)
        total = len(jobs) + len(names.hardware)
        for index, _ in enumerate(_run(_trace, jobs, num_processes)):
            advance(index + 1, total)
        rows = []
        for index, row in enumerate(_run(_plan_row, [(names, hardware) for hardware in names.hardware], num_processes)):
            advance(len(jobs) + index + 1, total)
            rows += row
        return rows
    finally:
        _configs = None


def _jobs(names: GridNames, configs: GridConfigs) -> list[tuple[str, Sequence[tuple[str, str, str]]]]:
    """What is traced at once: a language model as one kind of card has it, largest batch first; an encoder with its projectors."""
    jobs: list[tuple[str, Sequence[tuple[str, str, str]]]] = []
    for llm in names.llm:
        kinds: dict[Any, tuple[str, str, str]] = {}
        for hardware in names.hardware:
            cell = (hardware, names.encoder[0], llm)
            config = configs.config(*cell)
            kind = (
                config.hardware.precision,
                planned_card(config).has_flash,
                config.llm.quantization,
                config.hardware.gradient_checkpointing,
            )
            if kind not in kinds or config.data.batch_size > configs.config(*kinds[kind]).data.batch_size:
                kinds[kind] = cell
        jobs += [("llm", [cell]) for cell in kinds.values()]
    return jobs + [("encoder", [cell for cell in cells(names) if cell[1] == encoder]) for encoder in names.encoder]


def _trace(job: tuple[str, Sequence[tuple[str, str, str]]]) -> None:
    """Makes the traces of a job, for the store."""
    what, members = job
    done = set()
    for cell in members:
        assert _configs is not None
        try:
            config = _configs.config(*cell)
            if what == "llm":
                tracer = _tracer(config, sizes=False)
                tracer.anchors(config.llm.max_caption_tokens)
                tracer.anchors(0)
                continue
            tracer = _tracer(config)
            for num_clips in {config.data.batch_size, config.data.eval_batch_size}:
                key = (cell[0], num_clips, tracer.width)
                if key not in done:
                    done.add(key)
                    tracer.encoder(num_clips)
                    tracer.projector(num_clips)
        except UserError:  # the cell says so
            continue


def _plan_row(job: tuple[GridNames, str]) -> list[Cell]:
    from vlmcap.planning.grid.table import Cell

    names, hardware = job
    assert _configs is not None
    row = []
    for encoder in names.encoder:
        for llm in names.llm:
            usable = 0.0
            try:
                config = _configs.config(hardware, encoder, llm)
                usable = planned_card(config).usable_gib
                plan = make_plan(config, tracer=_tracer(config))
                row.append(Cell(hardware, encoder, llm, usable, plan.training_gib, plan.generation_gib))
            except UserError as error:
                row.append(Cell(hardware, encoder, llm, usable, error=str(error)))
    return row


def _tracer(config: Config, *, sizes: bool = True) -> QuickTracer:
    from vlmcap.planning.estimate.quick_traces import NO_SIZES

    return QuickTracer(config, planned_card(config).has_flash, None if sizes else NO_SIZES)


def _run(work: Callable[[Any], Any], jobs: Sequence[Any], num_processes: int | None) -> Iterator[Any]:
    """Results in order, from forked processes, which have all that is loaded here; where there are none, from this one."""
    import multiprocessing

    count = min(num_processes or os.cpu_count() or 1, _MOST_PROCESSES, len(jobs))
    if count < 2 or "fork" not in multiprocessing.get_all_start_methods():
        yield from map(work, jobs)
        return
    with multiprocessing.get_context("fork").Pool(count, initializer=_leave_interrupts) as pool:
        yield from pool.imap(work, jobs)


def _leave_interrupts() -> None:
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its processes


@contextmanager
def _bar(is_shown: bool) -> Iterator[Advance]:
    if not is_shown:
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("Tracing", total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
