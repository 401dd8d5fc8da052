"""Results of a check, one line of JSON each."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

GOOD = ("pass", "info", "rehearsed")  # "skipped" is neither good nor bad
BAD = ("fail", "error", "stopped")


class Skip(Exception):  # noqa: N818 - not an error: this GPU cannot run the check
    """A check that cannot run here; the message says what it needs."""


@dataclass(frozen=True, slots=True)
class Limit:
    """The bounds of a figure.

    Attributes:
        least: Lower bound; None for none.
        most: Upper bound; None for none.
        source: Where the bounds come from, in one line.
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
        """Returns how far a figure is outside of the bounds; 0 within them, and NaN without a figure."""
        if value != value:
            return value
        below = 0.0 if self.least is None else self.least - value
        above = 0.0 if self.most is None else value - self.most
        return max(0.0, below, above)


@dataclass(frozen=True, slots=True)
class Row:
    """A figure, or the end of a check.

    Attributes:
        check: Name of the check.
        case: What was run.
        measure: What was measured, with its unit.
        value: Figure; None where there is none.
        verdict: pass, fail, info (no bounds), rehearsed (tiny size, where bounds mean nothing), skipped, stopped or
            error.
        limit: Bounds in words.
        source: Where the bounds come from.
        note: Details, such as how far a figure is outside of its bounds.
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
        """Whether the row reports how a check ended."""
        return not self.measure


class Report:
    """Collects the figures of a check, and writes each immediately, so that none is lost if the check is stopped.

    Args:
        check: Name of the check.
        path: File that lines are added to.
        is_rehearsal: Whether bounds mean nothing.
    """

    def __init__(self, check: str, path: Path, *, is_rehearsal: bool) -> None:
        self.check, self.path, self.is_rehearsal = check, path, is_rehearsal
        self.rows: list[Row] = []

    def add(self, case: str, measure: str, value: float, limit: Limit | None = None, note: str = "") -> None:
        """Adds a figure with its verdict."""
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
        """Reports a case that cannot run here."""
        self._write(Row(self.check, case, "not run", None, "skipped", note=f"skipped: {reason}"))

    def fail(self, case: str, reason: str) -> None:
        """Reports a case that failed with an error."""
        self._write(Row(self.check, case, "not run", None, "error", note=reason))

    def _write(self, row: Row) -> None:
        self.rows.append(row)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(as_line(row))


def as_line(row: Row | dict[str, Any]) -> str:
    """Returns a row, or the description of a machine, as a line of JSON, with null for infinity and NaN."""
    plain = asdict(row) if isinstance(row, Row) else row
    finite = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in plain.items()
    }
    return json.dumps(finite, ensure_ascii=False) + "\n"


def read_rows(path: Path) -> tuple[dict[str, Any], list[Row]]:
    """Reads the machine and the rows of a file; empty where there is none.

    An incomplete last line, which a stopped writer leaves, is ignored.
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
    """Returns the verdict of a check that ran to its end.

    It is the worst of its rows, where skipped rows count as good if others ran.
    """
    verdicts = {row.verdict for row in rows}
    for bad in ("error", "fail"):
        if bad in verdicts:
            return bad
    if "rehearsed" in verdicts:
        return "rehearsed"
    return "pass" if verdicts - {"skipped"} else "skipped"


def short(value: float | None) -> str:
    """Formats a figure with four significant digits."""
    if value is None or value != value:
        return "–"
    if value == 0 or 0.001 <= abs(value) < 100_000:
        return f"{value:.4g}" if abs(value) < 10_000 else f"{value:.0f}"
    return f"{value:.2e}"
