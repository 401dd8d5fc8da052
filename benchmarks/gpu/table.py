"""Formats the results of a run as a page of Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.gpu.rows import Row, short

_SIGNS = {"pass": "pass", "fail": "**FAIL**", "error": "**ERROR**", "stopped": "**STOPPED**"}
_MOST_NOTE = 300  # characters


def page(machine: dict[str, Any], rows: Sequence[Row], titles: dict[str, str]) -> str:
    """Returns the summary of all checks, then the figures of each: first those with bounds, then the others.

    Args:
        machine: Description of the machine.
        rows: Rows of all checks.
        titles: Check name to what the check does, in the order of the page.
    """
    names = [name for name in titles if any(row.check == name for row in rows)]
    sections = [
        f"# Acceptance run on {machine.get('gpu', 'an unknown machine')}",
        _machine(machine),
        _summary(names, rows, titles),
    ]
    for name in names:
        shown = [row for row in rows if row.check == name and not row.is_end]
        bounded, others = [row for row in shown if _is_bounded(row)], [row for row in shown if not _is_bounded(row)]
        sections += [f"## {name}", titles[name]]
        sections += [_bounded(bounded)] if bounded else []
        sections += _pivots(others)
    return "\n\n".join(sections) + "\n"


def _is_bounded(row: Row) -> bool:
    return bool(row.limit) or row.value is None


def _machine(machine: dict[str, Any]) -> str:
    facts = {key: value for key, value in machine.items() if key != "gpu" and value not in (None, "")}
    return ", ".join(f"{key} {value}" for key, value in facts.items()) + "."


def _summary(names: Sequence[str], rows: Sequence[Row], titles: dict[str, str]) -> str:
    lines = []
    for name in names:
        shown = [row for row in rows if row.check == name]
        end = next((row for row in shown if row.is_end), None)
        bounded = [row for row in shown if row.limit and row.verdict != "rehearsed"]
        count = f"{sum(row.verdict == 'pass' for row in bounded)} of {len(bounded)}" if bounded else "–"
        seconds = short(end.value) if end else "–"
        lines.append(
            [name, _sign(end.verdict if end else "stopped"), count, seconds, end.note if end else "it did not end"]
        )
    return _table(["check", "verdict", "figures within bounds", "seconds", "note"], lines)


def _bounded(rows: Sequence[Row]) -> str:
    lines = [
        [row.case, row.measure, short(row.value), row.limit, _sign(row.verdict), row.note, row.source] for row in rows
    ]
    return _table(["case", "measure", "value", "bound", "verdict", "note", "source of the bound"], lines)


def _pivots(rows: Sequence[Row]) -> list[str]:
    """Returns tables of figures without bounds, which are for comparison; cases with a common measure share a table."""
    groups: list[list[Row]] = []
    for case in dict.fromkeys(row.case for row in rows):
        shown = [row for row in rows if row.case == case]
        measures = {row.measure for row in shown}
        group = next((group for group in groups if measures & {row.measure for row in group}), None)
        if group is None:
            groups.append(shown)
        else:
            group += shown
    return [_pivot(group) for group in groups]


def _pivot(rows: Sequence[Row]) -> str:
    """Returns a table with a line per case and a column per measure; variants of a measure are adjacent."""
    cases, measures = list(dict.fromkeys(row.case for row in rows)), list(dict.fromkeys(row.measure for row in rows))
    kinds = [measure.partition(",")[0] for measure in measures]
    measures.sort(key=lambda measure: kinds.index(measure.partition(",")[0]))
    found = {(row.case, row.measure): row for row in rows}
    lines = [
        [case, *(short(row.value) if (row := found.get((case, name))) else "" for name in measures)] for case in cases
    ]
    return _table(["without bounds", *measures], lines)


def _sign(verdict: str) -> str:
    return _SIGNS.get(verdict, verdict)


def _table(titles: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Formats a table without its empty columns."""
    kept = [index for index in range(len(titles)) if any(line[index] for line in lines)]
    rows = [
        [titles[index] for index in kept],
        ["---" for _ in kept],
        *([_cell(line[index]) for index in kept] for line in lines),
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _cell(text: str) -> str:
    text = " ".join(text.split()).replace("|", "\\|")
    return text if len(text) <= _MOST_NOTE else f"{text[:_MOST_NOTE]}…"
