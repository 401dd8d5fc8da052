"""What every command prints alike: progress of long work, and numbers with their units."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def passing_bar(text: str, total: int) -> Iterator[Callable[[], object]]:
    """A bar on stderr that goes when it is done, as a function that moves it by one; only on a terminal."""
    from rich.console import Console
    from rich.progress import Progress

    if not sys.stderr.isatty():
        yield lambda: None
        return
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task: Any = bar.add_task(text, total=total)
        yield lambda: bar.advance(task)


def progress_reporter(label: str) -> Callable[[int, int], None]:
    """A function of work done and work in all that draws a bar on a terminal, and in a log says only start and end."""
    if not sys.stderr.isatty():
        started = time.perf_counter()

        def report_line(done: int, total: int) -> None:
            if done == total:
                print(f"{label}: {total} in {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)

        return report_line
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=Console(stderr=True))
    task = bar.add_task(label, total=None)
    bar.start()

    def report_bar(done: int, total: int) -> None:
        bar.update(task, completed=done, total=total)
        if done == total:
            bar.stop()

    return report_bar


def gigabytes(num_bytes: float) -> str:
    """`31.2 GB`, or `8.5 MB` or `0.7 kB` where it is less."""
    unit, size = next(((unit, size) for unit, size in (("GB", 1e9), ("MB", 1e6)) if num_bytes >= size), ("kB", 1e3))
    return f"{num_bytes / size:.1f} {unit}"


def grouped(count: int) -> str:
    """`2 300`."""
    return f"{count:,}".replace(",", " ")


def duration(seconds: float) -> str:
    """`1.4 h`, `3.0 min`, `12 s` or `0.8 ms`."""
    if seconds >= 5400:
        return f"{seconds / 3600:.1f} h"
    if seconds >= 90:
        return f"{seconds / 60:.1f} min"
    return f"{seconds:.3g} s" if seconds >= 1 or math.isclose(seconds, 0) else f"{seconds * 1000:.3g} ms"
