"""Long work shows a bar on a terminal and, by time, lines in a log; short work shows nothing more than before."""

from __future__ import annotations

import sys
import threading
import time
from types import SimpleNamespace

import pytest

from vlmcap import terminal
from vlmcap.terminal import LineClock, WorkLines, progress_reporter, transient_bar


class FakeClock:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def moments(clock: FakeClock, schedule: LineClock, seconds: int) -> list[int]:
    """Seconds since now at which a line is due, looked at each second."""
    due = []
    for second in range(1, seconds + 1):
        clock.now += 1
        if schedule.is_due():
            due.append(second)
    return due


def test_intervals_grow_to_five_minutes() -> None:
    clock = FakeClock()
    assert moments(clock, LineClock(clock), 1500) == [30, 90, 210, 450, 750, 1050, 1350]


def test_another_line_postpones_the_next() -> None:
    clock = FakeClock()
    schedule = LineClock(clock)
    assert moments(clock, schedule, 29) == []
    schedule.postpone()
    assert moments(clock, schedule, 40) == [30]


def test_lines_tell_what_is_done_and_left(capsys: pytest.CaptureFixture[str]) -> None:
    clock = FakeClock()
    lines = WorkLines("encoding", clock)
    lines.report(100, 2300)  # was there before
    for done in range(101, 131):
        clock.now += 1
        lines.report(done, 2300)
        lines.tick()
    assert capsys.readouterr().err == "encoding: 130 of 2 300, 30 s so far, 36.2 min left\n"
    clock.now += 59
    lines.tick()
    assert capsys.readouterr().err == ""
    clock.now += 1  # nothing was reported for a minute, and yet there is a line
    lines.tick()
    assert capsys.readouterr().err == "encoding: 130 of 2 300, 1.5 min so far, 1.8 h left\n"


@pytest.mark.parametrize(
    ("reports", "expected"), [([], "30 s so far"), ([(0, 8)], "0 of 8, 30 s so far"), ([(7, None)], "7, 30 s so far")]
)
def test_a_line_says_no_more_than_is_known(reports: list[tuple[int, int | None]], expected: str) -> None:
    clock = FakeClock()
    lines = WorkLines("scoring", clock)
    for done, total in reports:
        lines.report(done, total)
    clock.now += 30
    assert lines.text() == f"scoring: {expected}"


def test_short_work_has_the_line_at_the_end_alone(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_reporter("short") as report:
        for done in range(1, 5):
            report(done, 4)
    with progress_reporter("without a count"):
        pass
    with progress_reporter("not worth a line", silent_s=5) as report:
        report(4, 4)
    with transient_bar("a step", 2) as advance:
        advance()
    assert capsys.readouterr().err == "short: 4 in 0 s\n"


def test_work_that_reports_nothing_is_not_silent(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(terminal, "_FIRST_LINE_S", 0.05)
    with progress_reporter("scoring"):
        time.sleep(0.12)
    with transient_bar("tracing", 3) as advance:
        advance()
        time.sleep(0.12)
    first, *_, last = capsys.readouterr().err.splitlines()
    assert first.startswith("scoring: ") and last.startswith("tracing: 1 of 3, ")


def threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.is_alive()}


@pytest.mark.parametrize("is_terminal", [False, True])
@pytest.mark.parametrize("is_begun", [False, True])
def test_work_that_raises_stops_its_bar(is_terminal: bool, is_begun: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    stderr = SimpleNamespace(isatty=lambda: is_terminal, write=written.append, flush=lambda: None, encoding="utf-8")
    monkeypatch.setattr("sys.stderr", stderr)
    before = threads()
    with pytest.raises(RuntimeError), progress_reporter("work") as report:
        if is_begun:
            report(1, 4)
        raise RuntimeError
    for thread in threads() - before:
        thread.join(5)
    assert threads() == before
    assert ("work" in "".join(written)) == (is_terminal and is_begun)


def test_a_terminal_gets_the_bar_and_no_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    stderr = SimpleNamespace(isatty=lambda: True, write=written.append, flush=lambda: None, encoding="utf-8")
    monkeypatch.setattr("sys.stderr", stderr)
    monkeypatch.setattr(terminal, "_FIRST_LINE_S", 0.01)
    with progress_reporter("work") as report:
        report(1, 2)
        time.sleep(0.05)
        report(2, 2)
    assert "2/2" in "".join(written) and "so far" not in "".join(written)


class OutStream:
    """A stream of a notebook's kernel, as far as bars know one."""

    encoding = "utf-8"

    def __init__(self) -> None:
        self.written: list[str] = []

    def isatty(self) -> bool:
        return False

    def write(self, text: str) -> None:
        self.written.append(text)

    def flush(self) -> None:
        pass


def begin_notebook(monkeypatch: pytest.MonkeyPatch) -> OutStream:
    """Makes this process look like a kernel without ipywidgets."""
    stream = OutStream()
    monkeypatch.setitem(sys.modules, "ipykernel.iostream", SimpleNamespace(OutStream=OutStream))
    monkeypatch.setattr("sys.stderr", stream)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    return stream


def test_a_notebook_gets_a_bar_that_is_written_over(monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = begin_notebook(monkeypatch)
    monkeypatch.setattr(terminal, "_FIRST_LINE_S", 0.01)
    with progress_reporter("work") as report:
        report(1, 4)
        time.sleep(0.05)
        report(4, 4)
    with progress_reporter("short", silent_s=5) as report:
        report(1, 1)
    with transient_bar("a step", 2) as advance:
        advance()
    text = "".join(notebook.written)
    assert "\rwork: 100%" in text and "4/4" in text and "so far" not in text and "short" not in text
    assert text.rstrip(" ").endswith("\r"), "what is only a step on the way is wiped out"


def test_a_notebook_gets_a_widget_where_there_are_some(monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = begin_notebook(monkeypatch)
    made: list[dict[str, object]] = []

    class Widget:
        n, total = 0, 0

        def __init__(self, **options: object) -> None:
            made.append(options)

        def update(self, number: int) -> None:
            self.n += number

        def close(self) -> None:
            made.append({"at": self.n})

    monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if name == "ipywidgets" else None)
    monkeypatch.setitem(sys.modules, "tqdm.notebook", SimpleNamespace(tqdm=Widget))
    with progress_reporter("work") as report:
        report(1, 4)
        report(3, 4)
    assert made == [{"desc": "work", "total": 4, "leave": True}, {"at": 3}]
    assert notebook.written == []
