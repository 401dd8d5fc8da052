"""Writes a report as CSV and Markdown, and prints it on the terminal."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from vlmcap.reporting.report.records import Difference, Effect, Ends, GroupRow, Report, RunRow, Value
from vlmcap.reporting.report.rows import ALPHA

_RUN_COLUMNS = ("id", "name", "group", "seed", "status", "reason")  # the factors stand behind the first three
_COST_COLUMNS = (
    "seconds", "peak_memory_gib", "planned_gib", "parameters", "trained_parameters", "is_collapsed", "not_compared"
)  # fmt: skip
_GROUP_COLUMNS = (
    "score", "low", "high", "seeds", "difference", "difference_low", "difference_high", "p", "p_holm"
)  # fmt: skip


def leaderboard_csv(report: Report) -> str:
    """Returns a CSV table with a line per run: its single values, then those of its group."""
    names = list(dict.fromkeys(key for run in report.runs for key in run.scores))
    groups = {group.id: group for group in report.groups}
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    intervals = (f"{report.metric}/low", f"{report.metric}/high")
    writer.writerow(
        [*_RUN_COLUMNS[:3], *report.factors, *_RUN_COLUMNS[3:], *names, *intervals, *_COST_COLUMNS]
        + [f"group/{name}" for name in _GROUP_COLUMNS]
        + ["revision", "folder", "command"]
    )
    for run in report.runs:
        low, high = run.intervals.get(report.metric, ("", ""))
        writer.writerow(
            [
                run.id,
                run.name,
                run.group,
                *(_cell(run.factors[factor]) for factor in report.factors),
                _cell(run.seed),
                run.status,
            ]
            + [run.reason, *(_cell(run.scores.get(name)) for name in names), low, high]
            + [_cell(value) for value in (run.seconds.get("total"), run.peak_memory_gib, run.planned_gib)]
            + [
                _cell(run.parameters.get("total")),
                _cell(run.parameters.get("trained")),
                _cell(run.is_collapsed),
                run.not_compared,
            ]
            + _group_cells(groups[run.group], report.metric)
            + [run.revision, run.folder, run.command]
        )
    return file.getvalue()


def report_markdown(report: Report) -> str:
    """Returns the tables as Markdown, for instance for pull requests; the page contains more."""
    parts = [f"# {_escaped(report.title)}", conclusion(report), _facts(report), _leaderboard(report)]
    parts += [_effect(effect, report) for effect in report.effects] if len(report.factors) > 1 else []
    parts += [_fronts(report), _categories(report), _unfinished(report), _warnings(report)]
    parts.append("## Notes\n\n" + "\n".join(f"- {_escaped(note.en)}" for note in report.notes))
    commands = "\n".join(f"# {run.name}\n{run.command}" for run in report.runs if run.command)
    parts.append(f"## Commands\n\n```bash\n{commands}\n```" if commands else "")
    return "\n\n".join(part for part in parts if part) + "\n"


def show_report(report: Report) -> None:
    """Prints the leaderboard, unfinished runs and warnings."""
    table = Table(title=report.metric_label, title_justify="left", title_style="bold", caption_justify="left")
    console = Console()
    # A narrow terminal has no room for memory and minutes.
    columns = ("seeds", "score", "95 %", "vs. best", "p (Holm)", "GiB", "min")[: 7 if console.width >= 100 else 5]
    table.add_column("configuration", overflow="fold")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for group in report.groups:
        if report.metric in group.scores:
            table.add_row(group.name, *_cells(group, report.metric)[: len(columns)])
    console.print(table, markup=False)
    for run in report.runs:
        if run.status != "finished" or report.metric not in run.scores:
            reason = run.reason or f"no {report.metric}"
            console.print(f"{run.name}: {run.status}, {reason}", style="dim", markup=False, highlight=False)
        for sentence in _run_warnings(run):
            console.print(f"{run.name}: {sentence}", style="yellow", markup=False, highlight=False)


def conclusion(report: Report) -> str:
    """Returns one sentence: the best configuration, its score, and which others differ significantly from it."""
    best = next((group for group in report.groups if group.is_best), None)
    if best is None:
        return f"No run can be compared by {report.metric}."
    score = f"{best.scores[report.metric]:.3f}{_ends(best.intervals.get(report.metric))}"
    compared = [group for group in report.groups if group.difference is not None]
    head = f"{best.name} is best by {report.metric}: {score}"
    if not compared:
        return f"{head}; there is nothing to compare it with."
    over = next((group.difference.over for group in compared if group.difference and group.difference.over), "")
    # What the p-values are over; empty if that is not known.
    basis = {"clips": ", over clips, one seed each", "seeds": ", over seeds"}.get(over, "")
    tied = [group.name for group in compared if group.is_tied]
    if not tied:
        others = f"the other {len(compared)} are" if len(compared) > 1 else "the other one is"
        return f"{head}; {others} significantly different (p < {ALPHA}, Holm{basis})."
    shown = ", ".join(tied[:3]) + (f" and {len(tied) - 3} more" if len(tied) > 3 else "")
    return f"{head}; no significant difference (p ≥ {ALPHA}, Holm{basis}) from: {shown}."


def _cells(group: GroupRow, metric: str) -> list[str]:
    """Returns seeds, score, interval, difference, p-value, memory and minutes."""
    difference, memory, seconds = group.difference, group.costs["peak_memory_gib"], group.costs["seconds"]
    if difference is None:
        change, p_value = ("best", "") if group.is_best else ("–", "")
    else:
        change, p_value = f"{difference.value:+.3f}", _p_value(difference)
    minutes = "" if seconds is None else f"{seconds / 60:.1f}"
    interval = _ends(group.intervals.get(metric)).strip()
    return [
        str(len(group.seeds)),
        f"{group.scores[metric]:.3f}",
        interval,
        change,
        p_value,
        "" if memory is None else f"{memory:.1f}",
        minutes,
    ]


def _p_value(difference: Difference) -> str:
    value = difference.adjusted_p_value
    return "" if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"


def _ends(ends: Ends | None) -> str:
    return "" if ends is None else f" [{ends[0]:.3f}, {ends[1]:.3f}]"


def _facts(report: Report) -> str:
    lines = [f"{len(report.runs)} runs, {len(report.groups)} configurations, {report.created}, vlmcap {report.version}"]
    if report.num_clips:
        lines.append(
            f"compared on {report.num_clips} clips" + (f", tokenizer {report.tokenizer}" if report.tokenizer else "")
        )
    return "; ".join(lines) + "."


def _leaderboard(report: Report) -> str:
    more = [name for name in report.metrics if name != report.metric]
    header = ["configuration", "seeds", report.metric, "95 %", "vs. best", "p (Holm)", "GiB", "min", "trained", *more]
    rows = []
    for group in report.groups:
        if report.metric not in group.scores:
            continue
        name = f"**{_escaped(group.name)}**" if group.is_best else _escaped(group.name)
        trained = group.costs["trained"]
        count = "" if trained is None else f"{trained / 1e6:,.1f} M"
        rows.append([name, *_cells(group, report.metric), count, *(_number(group.scores.get(one)) for one in more)])
    return "## Leaderboard\n\n" + _table(header, rows)


def _effect(effect: Effect, report: Report) -> str:
    rows = []
    for level in effect.levels:
        cells = ["", "", ""]
        if (d := level.difference) is not None:
            interval = "" if d.low is None or d.high is None else f"[{d.low:+.3f}, {d.high:+.3f}]"
            cells = [f"{d.value:+.3f}", interval, _p_value(d)]
        rows.append([_escaped(str(level.value)), f"{level.score:.3f}", _ends(level.interval).strip(), *cells])
    kind = "Plain means: the values also differ in other factors."
    if effect.is_matched:
        kind = f"Means over the same combinations of all other factors for each value: {effect.num_combinations}."
    return f"## Effect of {effect.factor}\n\n{kind}\n\n" + _table(
        ["value", report.metric, "95 %", "vs. best", "95 %", "p (Holm)"], rows
    )


def _fronts(report: Report) -> str:
    names = {group.id: _escaped(group.name) for group in report.groups}
    costs = {"peak_memory_gib": "memory", "seconds": "time", "trained": "trained parameters"}
    lines = [f"- {costs[front.cost]}: {'; '.join(names[name] for name in front.groups)}" for front in report.fronts]
    return "## Pareto fronts: best score at each cost\n\n" + "\n".join(lines) if lines else ""


def _categories(report: Report) -> str:
    """Returns a table with a column for the best run of each of the first five groups."""
    # The members are sorted, so the first run of a group is its best.
    first = [next((run for run in report.runs if run.group == group.id), None) for group in report.groups[:5]]
    runs = [run for run in first if run is not None and report.metric in run.scores]
    metric = report.metric.partition("/")[2]
    if not report.categories or not any(
        metric in row for category in report.categories for row in category.scores.values()
    ):
        return ""
    rows = [
        [
            _escaped(category.name),
            str(category.num_clips),
            *(_number(category.scores.get(run.id, {}).get(metric)) for run in runs),
        ]
        for category in report.categories
    ]
    return f"## {report.metric} by category\n\n" + _table(
        ["category", "clips", *(_escaped(run.name) for run in runs)], rows
    )


def _unfinished(report: Report) -> str:
    rows = [[_escaped(run.name), run.status, _escaped(run.reason)] for run in report.runs if run.status != "finished"]
    return "## Runs that did not finish\n\n" + _table(["run", "status", "reason"], rows) if rows else ""


def _warnings(report: Report) -> str:
    lines = [f"- {_escaped(run.name)}: {_escaped(text)}" for run in report.runs for text in _run_warnings(run)]
    return "## Warnings\n\n" + "\n".join(lines) if lines else ""


def _run_warnings(run: RunRow) -> list[str]:
    return [*run.warnings, *([run.not_compared] if run.not_compared else [])]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _escaped(text: str) -> str:
    # A bar or a line break would end a cell, "<" would begin a tag.
    return text.replace("|", r"\|").replace("\n", " ").replace("<", "&lt;")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _cell(value: Value) -> str | int | float:
    return "" if value is None else str(value).lower() if isinstance(value, bool) else value


def _group_cells(group: GroupRow, metric: str) -> list[str | int | float]:
    low, high = group.intervals.get(metric, ("", ""))
    cells: list[str | int | float] = [_cell(group.scores.get(metric)), low, high, len(group.seeds)]
    if group.difference is None:
        return [*cells, "", "", "", "", ""]
    d = group.difference
    return [*cells, *(_cell(value) for value in (d.value, d.low, d.high, d.p_value, d.adjusted_p_value))]
