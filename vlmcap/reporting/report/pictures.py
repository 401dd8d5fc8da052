"""A report as pictures: the leaderboard, scores against costs, learning curves."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from matplotlib import font_manager, rc_context
from matplotlib.figure import Figure

from vlmcap.files import replacing
from vlmcap.reporting.report.data import GroupRow, Report

MOST_GROUPS = 40
"""Lines of the leaderboard and curves that are drawn, the best ones."""
_KOREAN = ("Noto Sans CJK KR", "Noto Sans KR", "Source Han Sans KR", "Pretendard", "NanumGothic", "Malgun Gothic", "Apple SD Gothic Neo",
           "AppleGothic", "NanumBarunGothic", "UnDotum", "Baekmuk Dotum")  # fmt: skip
_BEST, _LEVEL, _WORSE, _APART = "#1f6feb", "#6ea8fe", "#8c959f", "#d0d7de"
_COSTS: dict[str, tuple[str, float]] = {
    "peak_memory_gib": ("GiB at the peak", 1.0),
    "seconds": ("minutes of the run", 60.0),
    "trained": ("million trained parameters", 1e6),
}
_LONGEST = 60
_NAMED = 12  # curves and points with a name of their own


def draw_leaderboard(report: Report, file: Path) -> None:
    """Scores of the configurations with their intervals, best on top."""
    groups = [group for group in report.groups if report.metric in group.scores][:MOST_GROUPS]
    with _written(file, (8.5, 1.3 + 0.3 * max(2, len(groups)))) as figure:
        axes = figure.add_subplot()
        for row, group in enumerate(groups):
            score = group.scores[report.metric]
            low, high = group.intervals.get(report.metric, (score, score))
            axes.plot([low, high], [row, row], color=_colour(group), linewidth=2.5, solid_capstyle="round")
            axes.plot([score], [row], "o", color=_colour(group), markersize=7)
        axes.set_yticks(range(len(groups)), [_label(group) for group in groups], fontsize=9)
        axes.set(ylim=(len(groups) - 0.4, -0.6), xlabel=_label_of_metric(report))
        axes.grid(axis="x", color="#eaeef2")
        axes.set_axisbelow(True)
        over = next((group.over for group in groups if group.over), "")
        told = (
            f"95 % intervals over {over}; dark: best, light: not told apart from it" if over else "no intervals known"
        )
        axes.set_title(told, fontsize=9, loc="left", color="#57606a")
        _plain_frame(axes)


def draw_fronts(report: Report, file: Path) -> None:
    """The score against memory, time and trained parameters; a line joins what no other beats at its cost."""
    fronts = report.fronts
    with _written(file, (5.0 * max(1, len(fronts)), 4.2)) as figure:
        for index, front in enumerate(fronts):
            axes = figure.add_subplot(1, len(fronts), index + 1)
            name, unit = _COSTS[front.cost]
            points = {
                group.id: (cost / unit, group.scores[report.metric], group)
                for group in report.groups
                if (cost := group.costs.get(front.cost)) is not None and (group.is_best or group.difference is not None)
            }
            costs = [cost for cost, _, _ in points.values()]
            middle = (min(costs) + max(costs)) / 2
            axes.plot(
                *zip(*(points[one][:2] for one in front.groups), strict=True),
                color=_BEST,
                linewidth=1,
                drawstyle="steps-post",
            )
            for one, (cost, score, group) in points.items():
                is_front = one in front.groups
                axes.plot([cost], [score], "o", color=_BEST if is_front else _WORSE, markersize=7 if is_front else 5)
                if is_front or len(points) <= _NAMED:
                    side, shift = ("right", -5) if cost > middle else ("left", 5)  # a label stays inside
                    style: dict[str, Any] = {"fontsize": 7.5, "color": "black" if is_front else "#57606a"}
                    axes.annotate(
                        _label(group), (cost, score), textcoords="offset points", xytext=(shift, 6), ha=side, **style
                    )
            axes.set(xlabel=name, ylabel=_label_of_metric(report) if index == 0 else "")
            axes.margins(x=0.25, y=0.15)
            axes.grid(color="#eaeef2")
            _plain_frame(axes)
        if not fronts:
            _say(figure, "Two configurations with a score and a cost are needed.")


def draw_curves(report: Report, file: Path) -> None:
    """The training loss, and the report's metric, or else the validation loss, while training.

    A colour a configuration, a line a run.
    """
    runs = [run for run in report.runs if run.curve]
    order = [group for group in report.groups if any(run.group == group.id for run in runs)][:MOST_GROUPS]
    wanted = dict.fromkeys(["train/loss", report.metric, "val/loss"])
    shown = [key for key in wanted if any(len(run.curve.get(key, ())) > 1 for run in runs)][
        :2
    ]  # a single point is no course
    with _written(file, (6.0 * max(1, len(shown)) + 2.5, 4.2)) as figure:
        colours = _colours(len(order))
        for index, key in enumerate(shown):
            axes = figure.add_subplot(1, len(shown), index + 1)
            for place, group in enumerate(order):
                curves = [run.curve[key] for run in runs if run.group == group.id and key in run.curve]
                for number, curve in enumerate(curves):
                    name = _label(group) if number == 0 and place < _NAMED else None
                    mark = "o" if len(curve) < 8 else ""
                    axes.plot(
                        *zip(*curve, strict=True),
                        color=colours[place],
                        linewidth=1.2,
                        marker=mark,
                        markersize=3,
                        label=name,
                    )
            axes.set(xlabel="step", title=key)
            axes.grid(color="#eaeef2")
            _plain_frame(axes)
        if shown:
            handles, labels = figure.axes[0].get_legend_handles_labels()
            figure.legend(handles, labels, loc="outside right upper", fontsize=8, frameon=False)
        else:
            _say(figure, "No run has a metrics.jsonl with a course.")


@contextmanager
def _written(file: Path, inches: tuple[float, float]) -> Iterator[Figure]:
    """A figure that becomes a PNG when the block ends well."""
    with rc_context({"font.family": list(_families()), "text.parse_math": False, "axes.unicode_minus": False}):
        figure = Figure(figsize=inches, layout="constrained")
        yield figure
        with replacing(file) as partial:
            figure.savefig(partial, format="png", dpi=130)


@functools.cache
def _families() -> tuple[str, ...]:
    known = {font.name for font in font_manager.fontManager.ttflist}
    return ("DejaVu Sans", *[name for name in _KOREAN if name in known][:1])


@functools.cache
def _drawable() -> Callable[[str], bool]:
    """Whether every letter of a text is in a font that is there: what is not would be drawn as a box."""
    letters = {
        code for name in _families() for code in font_manager.get_font(font_manager.findfont(name)).get_charmap()
    }
    return lambda text: all(ord(letter) in letters for letter in text)


def _label(group: GroupRow) -> str:
    """The name, or the id where the name cannot be drawn."""
    name = group.name if len(group.name) <= _LONGEST else f"{group.name[: _LONGEST - 1]}…"
    return name if _drawable()(name) else group.id


def _label_of_metric(report: Report) -> str:
    return report.metric_label if _drawable()(report.metric_label) else "score"


def _colour(group: GroupRow) -> str:
    if group.is_best:
        return _BEST
    return _APART if group.difference is None else _LEVEL if group.is_level else _WORSE


def _colours(count: int) -> Sequence[Any]:
    from matplotlib import colormaps

    return [colormaps["tab10"](index) if count <= 10 else colormaps["turbo"](index / count) for index in range(count)]


def _plain_frame(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)


def _say(figure: Figure, text: str) -> None:
    figure.text(0.5, 0.5, text, ha="center", va="center")
