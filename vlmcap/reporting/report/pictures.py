"""Draws a report as PNG files: the leaderboard, scores against costs, and learning curves."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from matplotlib import font_manager, rc_context
from matplotlib.figure import Figure

from vlmcap.files import replacing
from vlmcap.reporting.report.records import GroupRow, Report

MAX_GROUPS = 40
"""Number of groups that are drawn, best first."""
_KOREAN_FONTS = (
    *("Noto Sans CJK KR", "Noto Sans KR", "Source Han Sans KR", "Pretendard", "NanumGothic", "Malgun Gothic"),
    *("Apple SD Gothic Neo", "AppleGothic", "NanumBarunGothic", "UnDotum", "Baekmuk Dotum"),
)
_BEST, _TIED, _WORSE, _NOT_COMPARED = "#1f6feb", "#6ea8fe", "#8c959f", "#d0d7de"
_COSTS: dict[str, tuple[str, float]] = {
    "peak_memory_gib": ("peak memory (GiB)", 1.0),
    "seconds": ("duration of the run (min)", 60.0),
    "trained": ("trained parameters (millions)", 1e6),
}
_MAX_NAME = 60  # characters
_MAX_LABELLED = 12  # curves or points that are labelled


def draw_leaderboard(report: Report, file: Path) -> None:
    """Draws the scores of the configurations with their intervals, best on top."""
    groups = [group for group in report.groups if report.metric in group.scores][:MAX_GROUPS]
    with _written(file, (8.5, 1.3 + 0.3 * max(2, len(groups)))) as figure:
        axes = figure.add_subplot()
        for row, group in enumerate(groups):
            # Without an interval, its ends are the score itself.
            score = group.scores[report.metric]
            low, high = group.intervals.get(report.metric, (score, score))
            axes.plot([low, high], [row, row], color=_colour(group), linewidth=2.5, solid_capstyle="round")
            axes.plot([score], [row], "o", color=_colour(group), markersize=7)
        axes.set_yticks(range(len(groups)), [_label(group) for group in groups], fontsize=9)
        # From large to small, so that the best row is on top.
        axes.set(ylim=(len(groups) - 0.4, -0.6), xlabel=_label_of_metric(report))
        axes.grid(axis="x", color="#eaeef2")
        axes.set_axisbelow(True)
        over = next((group.over for group in groups if group.over), "")
        title = f"95 % intervals over {over}; dark blue: best, light blue: no significant difference from it"
        axes.set_title(title if over else "no intervals available", fontsize=9, loc="left", color="#57606a")
        _hide_spines(axes)


def draw_fronts(report: Report, file: Path) -> None:
    """Draws the score against memory, time and trained parameters; a line joins the Pareto front."""
    fronts = report.fronts
    with _written(file, (5.0 * max(1, len(fronts)), 4.2)) as figure:
        for index, front in enumerate(fronts):
            axes = figure.add_subplot(1, len(fronts), index + 1)
            name, unit = _COSTS[front.cost]
            points = {
                group.id: (cost / unit, group.scores[report.metric], group)
                for group in report.groups
                # Only groups that are compared.
                if (cost := group.costs.get(front.cost)) is not None and (group.is_best or group.difference is not None)
            }
            costs = [cost for cost, _, _ in points.values()]
            middle = (min(costs) + max(costs)) / 2
            axes.plot(
                # The front as steps: at each cost, the best score up to it.
                *zip(*(points[one][:2] for one in front.groups), strict=True),
                color=_BEST,
                linewidth=1,
                drawstyle="steps-post",
            )
            for one, (cost, score, group) in points.items():
                is_front = one in front.groups
                axes.plot([cost], [score], "o", color=_BEST if is_front else _WORSE, markersize=7 if is_front else 5)
                if is_front or len(points) <= _MAX_LABELLED:
                    side, shift = ("right", -5) if cost > middle else ("left", 5)  # keeps the label inside the axes
                    style: dict[str, Any] = {"fontsize": 7.5, "color": "black" if is_front else "#57606a"}
                    axes.annotate(
                        _label(group), (cost, score), textcoords="offset points", xytext=(shift, 6), ha=side, **style
                    )
            axes.set(xlabel=name, ylabel=_label_of_metric(report) if index == 0 else "")
            axes.margins(x=0.25, y=0.15)
            axes.grid(color="#eaeef2")
            _hide_spines(axes)
        if not fronts:
            _draw_message(figure, "This plot needs at least two configurations with a score and a cost.")


def draw_curves(report: Report, file: Path) -> None:
    """Draws the training loss and the report's metric, or else the validation loss, over the steps of training.

    Each configuration has a colour, each run a line.
    """
    runs = [run for run in report.runs if run.curve]
    # Colours follow the ranking, and only the first run of a group has a label in the legend.
    order = [group for group in report.groups if any(run.group == group.id for run in runs)][:MAX_GROUPS]
    # The first two of these that have a curve.
    wanted = dict.fromkeys(["train/loss", report.metric, "val/loss"])
    shown = [key for key in wanted if any(len(run.curve.get(key, ())) > 1 for run in runs)][:2]
    with _written(file, (6.0 * max(1, len(shown)) + 2.5, 4.2)) as figure:
        colours = _colours(len(order))
        for index, key in enumerate(shown):
            axes = figure.add_subplot(1, len(shown), index + 1)
            for position, group in enumerate(order):
                curves = [run.curve[key] for run in runs if run.group == group.id and key in run.curve]
                for number, curve in enumerate(curves):
                    # One legend entry per group.
                    name = _label(group) if number == 0 and position < _MAX_LABELLED else None
                    # A curve of few points would be hard to see as a line.
                    mark = "o" if len(curve) < 8 else ""
                    axes.plot(
                        *zip(*curve, strict=True),
                        color=colours[position],
                        linewidth=1.2,
                        marker=mark,
                        markersize=3,
                        label=name,
                    )
            axes.set(xlabel="step", title=key)
            axes.grid(color="#eaeef2")
            _hide_spines(axes)
        if shown:
            handles, labels = figure.axes[0].get_legend_handles_labels()
            figure.legend(handles, labels, loc="outside right upper", fontsize=8, frameon=False)
        else:
            _draw_message(figure, "No run has a metrics.jsonl with at least two points of a curve.")


@contextmanager
def _written(file: Path, inches: tuple[float, float]) -> Iterator[Figure]:
    """Yields a figure, and saves it as a PNG file if the block raises no exception."""
    # Names contain "_" and "$", which matplotlib would read as formulas.
    with rc_context({"font.family": list(_families()), "text.parse_math": False, "axes.unicode_minus": False}):
        figure = Figure(figsize=inches, layout="constrained")
        yield figure
        with replacing(file) as partial:
            figure.savefig(partial, format="png", dpi=130)


@functools.cache
def _families() -> tuple[str, ...]:
    # matplotlib takes the first font of the list that has a letter.
    known = {font.name for font in font_manager.fontManager.ttflist}
    return ("DejaVu Sans", *[name for name in _KOREAN_FONTS if name in known][:1])


@functools.cache
def _drawable() -> Callable[[str], bool]:
    """Returns a predicate that is true if the installed fonts have every letter of a text."""
    letters = {
        code for name in _families() for code in font_manager.get_font(font_manager.findfont(name)).get_charmap()
    }
    return lambda text: all(ord(letter) in letters for letter in text)


def _label(group: GroupRow) -> str:
    """Returns the name of a group, or its id if the name cannot be drawn."""
    name = group.name if len(group.name) <= _MAX_NAME else f"{group.name[: _MAX_NAME - 1]}…"
    return name if _drawable()(name) else group.id


def _label_of_metric(report: Report) -> str:
    return report.metric_label if _drawable()(report.metric_label) else "score"


def _colour(group: GroupRow) -> str:
    if group.is_best:
        return _BEST
    return _NOT_COMPARED if group.difference is None else _TIED if group.is_tied else _WORSE


def _colours(count: int) -> Sequence[Any]:
    from matplotlib import colormaps

    # Ten colours that are easy to tell apart; more come from a continuous scale.
    return [colormaps["tab10"](index) if count <= 10 else colormaps["turbo"](index / count) for index in range(count)]


def _hide_spines(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)


def _draw_message(figure: Figure, text: str) -> None:
    figure.text(0.5, 0.5, text, ha="center", va="center")
