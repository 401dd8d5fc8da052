"""What a check found, a line of JSON each."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

GOOD = ("pass", "info", "rehearsed")  # "skipped" is neither good nor bad
BAD = ("fail", "error", "stopped")


class Skip(Exception):  # noqa: N818 - no error: the GPU at hand cannot run the check
    """A check that cannot run here; the message says what it needs."""


@dataclass(frozen=True, slots=True)
class Limit:
    """The bounds of a figure, and where they come from.

    Attributes:
        least: Lower bound; None for none.
        most: Upper bound; None for none.
        source: One line.
    """

    least: float | None
    most: float | None
    source: str

    def __str__(self) -> str:
        if self.least is None:
            return f"≤ {short(self.most)}"
        if self.most is None:
            return f"≥ {short(self.least)}"
        return short(self.least) if self.least == self.most else f"{short(self.least)} to {short(self.most)}"

    def distance(self, value: float) -> float:
        """How far a figure is out of the bounds; 0 within them, and not a number for none."""
        if value != value:
            return value
        below = 0.0 if self.least is None else self.least - value
        above = 0.0 if self.most is None else value - self.most
        return max(0.0, below, above)


@dataclass(frozen=True, slots=True)
class Row:
    """One figure, or the end of a check.

    Attributes:
        check: Name of the check.
        case: What was run.
        measure: What was measured, with its unit.
        value: The figure; None where there is none.
        verdict: pass, fail, info (no bounds), rehearsed (tiny size, where bounds say nothing), skipped, stopped or
            error.
        limit: The bounds in words.
        source: Where they come from.
        note: More, such as by how much a figure is out of its bounds.
    """

    check: str
    case: str
    measure: str
    value: float | None
    verdict: str
    limit: str = ""
    source: str = ""
    note: str = ""

    @property
    def is_end(self) -> bool:
        """Whether it says how a check ended."""
        return not self.measure


class Report:
    """Takes the figures of one check, and writes each at once, so that nothing is lost where the check is stopped.

    Args:
        check: Name of the check.
        path: File that lines are added to.
        is_rehearsal: Whether bounds say nothing.
    """

    def __init__(self, check: str, path: Path, *, is_rehearsal: bool) -> None:
        self.check, self.path, self.is_rehearsal = check, path, is_rehearsal
        self.rows: list[Row] = []

    def add(self, case: str, measure: str, value: float, limit: Limit | None = None, note: str = "") -> None:
        """Notes a figure, and its verdict where there are bounds."""
        verdict, by = "info", ""
        if limit is not None:
            distance = limit.distance(value)
            verdict = "pass" if distance == 0 else "fail"
            by = f"out by {short(distance)}" if verdict == "fail" and distance == distance else ""
        if self.is_rehearsal:
            verdict, by = "rehearsed", ""
        text = ("", "") if limit is None else (str(limit), limit.source)
        self._write(Row(self.check, case, measure, float(value), verdict, *text, "; ".join(filter(None, [by, note]))))

    def skip(self, case: str, reason: str) -> None:
        """Notes a case that cannot run here."""
        self._write(Row(self.check, case, "not run", None, "skipped", note=f"skipped: {reason}"))

    def fail(self, case: str, reason: str) -> None:
        """Notes a case that broke."""
        self._write(Row(self.check, case, "not run", None, "error", note=reason))

    def _write(self, row: Row) -> None:
        self.rows.append(row)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(as_line(row))


def as_line(row: Row | dict[str, Any]) -> str:
    """A row, or the description of a machine, as a line of JSON, which knows neither infinity nor what is no number."""
    plain = asdict(row) if isinstance(row, Row) else row
    finite = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in plain.items()
    }
    return json.dumps(finite, ensure_ascii=False) + "\n"


def read_rows(path: Path) -> tuple[dict[str, Any], list[Row]]:
    """The machine and the rows of a file, where it is there.

    Half a line at its end, as of a stopped writer, is left out.
    """
    machine: dict[str, Any] = {}
    rows: list[Row] = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []:
        if not line.endswith("\n"):
            continue
        content = json.loads(line)
        if "gpu" in content:
            machine = content
        else:
            rows.append(Row(**content))
    return machine, rows


def verdict_of(rows: Iterable[Row]) -> str:
    """Of a whole check that ran to its end.

    The worst of its rows, where skipped ones count as good beside others that ran.
    """
    verdicts = {row.verdict for row in rows}
    for bad in ("error", "fail"):
        if bad in verdicts:
            return bad
    if "rehearsed" in verdicts:
        return "rehearsed"
    return "pass" if verdicts - {"skipped"} else "skipped"


def short(value: float | None) -> str:
    """A figure with four digits that count."""
    if value is None or value != value:
        return "–"
    if value == 0 or 0.001 <= abs(value) < 100_000:
        return f"{value:.4g}" if abs(value) < 10_000 else f"{value:.0f}"
    return f"{value:.2e}"
