"""Console output of all commands: progress of long work, and numbers with units."""

from __future__ import annotations

import importlib.util
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from rich.console import Console

_FIRST_LINE_S, _MAX_INTERVAL_S = 30.0, 300.0  # first and largest interval between lines of a log
_PIPE_WIDTH = 140  # columns of a wide table that is not printed to a terminal


def leave_closed_pipe() -> NoReturn:
    """Ends a command whose output is no longer read, such as by `| head`, silently with the exit code of SIGPIPE."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # discards buffered output
    # 128 + 13, the number of SIGPIPE.
    raise SystemExit(141) from None


class LineClock:
    """Schedules the lines of long work in a log: after 30 s, then at intervals that double up to 5 minutes.

    Args:
        clock: Monotonic clock in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._interval_s = clock, _FIRST_LINE_S
        self._due = clock() + self._interval_s

    @property
    def seconds_left(self) -> float:
        """Seconds until the next line is due, at least 0."""
        return max(0.0, self._due - self._clock())

    def is_due(self) -> bool:
        """Returns whether a line is due; if so, schedules the next one after a longer interval."""
        if self.seconds_left > 0:
            return False
        self._interval_s = min(2 * self._interval_s, _MAX_INTERVAL_S)
        self.postpone()
        return True

    def postpone(self) -> None:
        """Restarts the interval, because something else was printed."""
        self._due = self._clock() + self._interval_s


class WorkLines:
    """Progress lines of long work in a log.

    The caller prints them with `tick`, or a thread does inside `running`, so that work without reports also has lines.

    Args:
        label: Description of the work.
        clock: Monotonic clock in seconds.
    """

    def __init__(self, label: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.label, self._clock, self._started = label, clock, clock()
        self._schedule = LineClock(clock)
        self._first: tuple[int, float] | None = None  # work done at the first report, and its time
        self.done = 0
        self.total: int | None = None
        self._ended = threading.Event()

    def report(self, done: int, total: int | None) -> None:
        """Records the work done and the total work, if known."""
        self._first = self._first or (done, self._clock())
        self.done, self.total = done, total

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return self._clock() - self._started

    def text(self) -> str:
        """Returns the work done, the time so far and, if it can be estimated, the time left."""
        share = (
            "" if self._first is None else f"{grouped(self.done)}{f' of {grouped(self.total)}' if self.total else ''}, "
        )
        line = f"{self.label}: {share}{duration(self.seconds)} so far"
        if self._first is None or self.total is None or self.done <= self._first[0]:
            return line
        # Work that was done before the first report, as after a resume, does not count.
        pace = (self._clock() - self._first[1]) / (self.done - self._first[0])
        return f"{line}, {duration(pace * (self.total - self.done))} left"

    def tick(self) -> None:
        """Prints the line if it is due."""
        if self._schedule.is_due():
            print(self.text(), file=sys.stderr, flush=True)

    @contextmanager
    def running(self) -> Iterator[Callable[[int, int | None], None]]:
        """Prints lines as they become due inside the context, and yields `report`."""
        thread = threading.Thread(target=self._run, daemon=True)
        thread.start()
        try:
            yield self.report
        finally:
            self._ended.set()
            thread.join()

    def _run(self) -> None:
        while not self._ended.wait(self._schedule.seconds_left):
            self.tick()


def draws_bars() -> bool:
    """Returns whether progress is shown as bars, on a terminal or in a notebook, and not as lines in a log."""
    return sys.stderr.isatty() or is_notebook()


def is_notebook() -> bool:
    """Returns whether this process is the kernel of a notebook that shows its output."""
    streams = sys.modules.get("ipykernel.iostream")
    return streams is not None and isinstance(sys.stderr, streams.OutStream)


@contextmanager
def progress_reporter(label: str, *, silent_s: float = 0.0) -> Iterator[Callable[[int, int | None], None]]:
    """Shows the progress of long work by a bar that stays, or by lines in a log with one at the end.

    Args:
        label: Description of the work.
        silent_s: Seconds for which nothing is shown; shorter work prints nothing.

    Yields:
        Callback `(done, total)`; total is None if it is unknown. Work that never calls it has no bar and no last line.
    """
    if draws_bars():
        with _bar(label, is_transient=False, silent_s=silent_s) as report:
            yield report
        return
    lines = WorkLines(label)
    with lines.running() as report:
        yield report
    if lines.total is not None and lines.done == lines.total and lines.seconds >= silent_s:
        print(f"{label}: {grouped(lines.total)} in {lines.seconds:.0f} s", file=sys.stderr, flush=True)


@contextmanager
def transient_bar(label: str, total: int) -> Iterator[Callable[[], object]]:
    """Shows the progress of an intermediate step by a bar that disappears, or by lines in a log if it takes long.

    Args:
        label: Description of the work.
        total: Number of steps.

    Yields:
        Callback that advances the bar by one step.
    """
    done = 0
    with _bar(label, is_transient=True) if draws_bars() else WorkLines(label).running() as report:

        def advance() -> None:
            nonlocal done
            done += 1
            report(done, total)

        report(0, total)
        yield advance


def _bar(
    label: str, *, is_transient: bool, silent_s: float = 0.0
) -> AbstractContextManager[Callable[[int, int | None], None]]:
    """Returns a bar that appears with the first report after `silent_s`, and yields its callback `(done, total)`."""
    return (_notebook_bar if is_notebook() else _terminal_bar)(label, is_transient=is_transient, silent_s=silent_s)


@contextmanager
def _terminal_bar(label: str, *, is_transient: bool, silent_s: float) -> Iterator[Callable[[int, int | None], None]]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    bar, started = Progress(*columns, console=Console(stderr=True), transient=is_transient), time.monotonic()
    task = bar.add_task(label, total=None)

    def report(done: int, total: int | None) -> None:
        bar.update(task, completed=done, total=total)
        # Not before `silent_s`, so that short work shows no bar.
        if not bar.live.is_started and time.monotonic() - started >= silent_s:
            bar.start()

    try:
        yield report
    finally:
        if bar.live.is_started:
            bar.stop()


@contextmanager
def _notebook_bar(label: str, *, is_transient: bool, silent_s: float) -> Iterator[Callable[[int, int | None], None]]:
    """Shows a widget if ipywidgets is installed, like Lightning's bar, else a line that is overwritten.

    Rich supports only the widget.
    """
    if importlib.util.find_spec("ipywidgets") is None:
        from tqdm import tqdm
    else:
        from tqdm.notebook import tqdm

    bar: Any = None
    started = time.monotonic()

    def report(done: int, total: int | None) -> None:
        nonlocal bar
        if bar is None and time.monotonic() - started >= silent_s:
            bar = tqdm(desc=label, total=total, leave=not is_transient)
        if bar is not None:
            bar.total = total
            bar.update(done - bar.n)  # tqdm takes the increment

    try:
        yield report
    finally:
        if bar is not None:
            bar.close()


def step_printer() -> Callable[[str], None]:
    """Returns a callback that prints a finished step to stderr, with the seconds since this call."""
    started = time.perf_counter()
    return lambda step: print(f"[{time.perf_counter() - started:6.1f} s] {step}", file=sys.stderr, flush=True)


def wide_console() -> Console:
    """Returns a console for wide tables, which is also wide enough in a pipe."""
    from rich.console import Console

    return Console(width=max(_PIPE_WIDTH, Console().width))


def gigabytes(num_bytes: float) -> str:
    """Formats bytes as `31.2 GB`, `8.5 MB` or `0.7 kB`."""
    unit, size = next(((unit, size) for unit, size in (("GB", 1e9), ("MB", 1e6)) if num_bytes >= size), ("kB", 1e3))
    return f"{num_bytes / size:.1f} {unit}"


def grouped(count: int) -> str:
    """Formats a count as `2 300`."""
    return f"{count:,}".replace(",", " ")


def short_number(value: float) -> str:
    """Formats a number with about three digits: `1 204`, `93.4`, `0.31` or `0.002`."""
    size = abs(value)
    if size >= 1000:
        return grouped(round(value))
    return f"{value:.1f}" if size >= 10 else f"{value:.2f}" if size >= 0.1 or value == 0 else f"{value:.2g}"


def duration(seconds: float) -> str:
    """Formats seconds as `1.4 h`, `3.0 min`, `12 s` or `0.8 ms`."""
    if seconds >= 5400:
        return f"{seconds / 3600:.1f} h"
    if seconds >= 90:
        return f"{seconds / 60:.1f} min"
    return f"{seconds:.3g} s" if seconds >= 1 or math.isclose(seconds, 0) else f"{seconds * 1000:.3g} ms"
