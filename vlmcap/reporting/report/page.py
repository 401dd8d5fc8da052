"""The page of a report: one HTML file that needs nothing else, in English and Korean, light and dark."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from html import escape
from importlib.resources import files
from typing import Any

from vlmcap.metrics.scores import METRIC_LABELS
from vlmcap.reporting.report.data import Report
from vlmcap.reporting.report.thumbnails import Pictures

SCRIPTS = ("words.js", "dom.js", "leaderboard.js", "charts.js", "clips.js", "main.js")
MAX_POINTS = 240  # of a curve; more cannot be told apart on a screen
_DIGITS = 6

_LABELS = METRIC_LABELS | {"loss": "Loss"}


def report_page(report: Report, pictures: Mapping[str, Pictures] | None = None) -> str:
    """The whole page.

    Whatever the report holds is data to it: the page's own code makes text of it, and the browser is told to run and to fetch nothing else.

    Args:
        report: What it shows.
        pictures: By clip id, for clips without `thumbnails` of their own: frames, or why there are none.
    """
    style, script = _part("page.css"), "".join(_part(name) for name in SCRIPTS)
    data = _embedded(page_data(report, pictures or {}))
    policy = f"default-src 'none'; img-src data:; style-src {_hash(style)}; script-src {_hash(script)}; base-uri 'none'; form-action 'none'"
    return (
        f'<!doctype html>\n<html lang="en" data-theme="light"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(policy)}">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{escape(report.title)}</title>'
        f'<link rel="icon" href="data:,"><style>{style}</style></head>\n<body><div id="bar"></div><main id="page">'
        f"<h1>{escape(report.title)}</h1><noscript>This page needs JavaScript. 이 페이지는 JavaScript가 필요합니다.</noscript></main>\n"
        f'<script type="application/json" id="data">{data}</script>\n<script>{script}</script></body></html>\n'
    )


def page_data(report: Report, pictures: Mapping[str, Pictures]) -> dict[str, Any]:
    """What the page embeds: the report as plain data, made small, with labels and pictures."""
    plain = report.plain()
    common = _common_config([run["config"] for run in plain["runs"]])
    for run in plain["runs"]:
        run["config"] = {key: value for key, value in run["config"].items() if key not in common}
        run["curve"] = {name: _thinned(points) for name, points in run["curve"].items()}
    for clip in plain["clips"]:
        found = pictures.get(clip["id"])
        clip["thumbnails"] = clip["thumbnails"] or ([] if found is None else list(found.frames))
        clip["picture_note"] = "" if found is None else found.reason
    small: dict[str, Any] = _rounded(plain | {"common_config": common, "labels": _LABELS})
    return small


def _part(name: str) -> str:
    return (files("vlmcap.reporting.report") / "web" / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """How a content security policy names the one script or style that may act."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _embedded(data: Any) -> str:
    """JSON that cannot end the element it stands in, whatever texts it holds."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return (
        text.replace("<", "\\u003c")
        .replace(">", "\\u003e")
        .replace("&", "\\u0026")
        .replace("\u2028", "\\u2028")
        .replace("\u2029", "\\u2029")
    )


def _common_config(configs: list[dict[str, Any]]) -> dict[str, Any]:
    """Keys with one value in all configurations that there are: written once, they halve a page of many runs."""
    known = [config for config in configs if config]
    if len(known) < 2:
        return {}
    return {key: value for key, value in known[0].items() if all(key in config and config[key] == value for config in known[1:])}


def _thinned(points: list[Any]) -> list[Any]:
    if len(points) <= MAX_POINTS:
        return points
    return [points[round(index * (len(points) - 1) / (MAX_POINTS - 1))] for index in range(MAX_POINTS)]


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list | tuple) else value
