"""What every command prints alike: progress of long work, and numbers with their units."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

_PIPE_WIDTH = 140  # columns of a wide table that is not printed to a terminal


def progress_reporter(label: str) -> Callable[[int, int], None]:
    """Progress of long work whose result stays: a bar that stays on a terminal, and one line at the end in a log.

    Args:
        label: What is done.

    Returns:
        A function of the work done and of all work; the bar ends when both are equal.
    """
    if not sys.stderr.isatty():
        started = time.perf_counter()

        def report_line(done: int, total: int) -> None:
            if done == total:
                print(f"{label}: {total} in {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)

        return report_line
    bar = _bar(is_transient=False)
    task = bar.add_task(label, total=None)
    bar.start()

    def report_bar(done: int, total: int) -> None:
        bar.update(task, completed=done, total=total)
        if done == total:
            bar.stop()

    return report_bar


@contextmanager
def passing_bar(label: str, total: int) -> Iterator[Callable[[], object]]:
    """Progress of work that is only a step on the way: a bar on a terminal that disappears at the end, and nothing in a log.

    Args:
        label: What is done.
        total: Number of steps.

    Yields:
        A function that moves the bar by one step.
    """
    if not sys.stderr.isatty():
        yield lambda: None
        return
    with _bar(is_transient=True) as bar:
        task = bar.add_task(label, total=total)
        yield lambda: bar.advance(task)


def _bar(*, is_transient: bool) -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), transient=is_transient)


def step_printer() -> Callable[[str], None]:
    """A function that prints to stderr which step has ended, with the seconds since this call."""
    started = time.perf_counter()
    return lambda step: print(f"[{time.perf_counter() - started:6.1f} s] {step}", file=sys.stderr, flush=True)


def wide_console() -> Console:
    """The terminal for wide tables, which has room for them in a pipe too."""
    from rich.console import Console

    return Console(width=max(_PIPE_WIDTH, Console().width))


def gigabytes(num_bytes: float) -> str:
    """`31.2 GB`, or `8.5 MB` or `0.7 kB` where it is less."""
    unit, size = next(((unit, size) for unit, size in (("GB", 1e9), ("MB", 1e6)) if num_bytes >= size), ("kB", 1e3))
    return f"{num_bytes / size:.1f} {unit}"


def grouped(count: int) -> str:
    """`2 300`."""
    return f"{count:,}".replace(",", " ")


def short_number(value: float) -> str:
    """About three digits: `1 204`, `93.4`, `0.31` or `0.002`."""
    size = abs(value)
    if size >= 1000:
        return grouped(round(value))
    return f"{value:.1f}" if size >= 10 else f"{value:.2f}" if size >= 0.1 or value == 0 else f"{value:.2g}"


def duration(seconds: float) -> str:
    """`1.4 h`, `3.0 min`, `12 s` or `0.8 ms`."""
    if seconds >= 5400:
        return f"{seconds / 3600:.1f} h"
    if seconds >= 90:
        return f"{seconds / 60:.1f} min"
    return f"{seconds:.3g} s" if seconds >= 1 or math.isclose(seconds, 0) else f"{seconds * 1000:.3g} ms"
