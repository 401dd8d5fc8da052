"""Self-contained HTML: one file, no network, light and dark, English and Korean."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape

import numpy as np
from numpy.typing import ArrayLike

Row = Sequence[str | int | float]

_STYLE = """
:root { color-scheme: light dark; --text: #1b1f24; --quiet: #59636e; --back: #ffffff; --line: #d1d9e0; --bar: #2f6feb; --mark: #d1242f; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e6edf3; --quiet: #9198a1; --back: #0d1117; --line: #3d444d; --bar: #4493f8; --mark: #f85149; } }
body { font: 15px/1.55 system-ui, "Noto Sans KR", "Malgun Gothic", sans-serif; color: var(--text); background: var(--back);
  max-width: 1100px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; border-bottom: 1px solid var(--line); padding-bottom: .3rem; }
table { border-collapse: collapse; } th, td { padding: .3rem .8rem .3rem 0; border-bottom: 1px solid var(--line); text-align: left;
  vertical-align: top; } td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
.quiet { color: var(--quiet); } .scroll { overflow-x: auto; }
.clip { margin: 1.2rem 0; padding-bottom: 1rem; border-bottom: 1px solid var(--line); } .clip img { height: 90px; margin-right: 4px; }
.clip p { margin: .4rem 0; max-width: 70ch; } button { float: right; font: inherit; color: inherit; background: none;
  border: 1px solid var(--line); border-radius: 6px; padding: .2rem .7rem; cursor: pointer; }
svg text { fill: var(--quiet); font-size: 11px; } svg .bar { fill: var(--bar); } svg .mark { stroke: var(--mark); }
svg text.mark { fill: var(--mark); stroke: none; }
html[data-language=en] [lang=ko], html[data-language=ko] [lang=en] { display: none; }
"""
_SCRIPT = """
const root = document.documentElement;
root.dataset.language = (navigator.language || "").startsWith("ko") ? "ko" : "en";
document.getElementById("language").onclick = () => { root.dataset.language = root.dataset.language === "ko" ? "en" : "ko"; };
"""


def both(english: str, korean: str) -> str:
    """A text in both languages, of which the page shows one; Markup, the texts are escaped."""
    return f'<span lang="en">{escape(english)}</span><span lang="ko">{escape(korean)}</span>'


def page(title: str, korean_title: str, body: str) -> str:
    """A whole page; `body` is markup."""
    return (
        f'<!doctype html>\n<html lang="en" data-language="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{escape(title)}</title>'
        f'<link rel="icon" href="data:,"><style>{_STYLE}</style></head>\n<body>'
        f'<button id="language" type="button">{both("한국어", "English")}</button><h1>{both(title, korean_title)}</h1>\n'
        f"{body}\n<script>{_SCRIPT}</script></body></html>\n"
    )


def table(header: Sequence[str], rows: Iterable[Row]) -> str:
    """A table; cells of the header are markup, numbers are set to the right, other cells are escaped."""
    body = [list(row) for row in rows]
    is_number = [bool(body) and all(isinstance(row[i], int | float) for row in body) for i in range(len(header))]
    kind = [' class="number"' if number else "" for number in is_number]
    head = "".join(f"<th{kind[i]}>{cell}</th>" for i, cell in enumerate(header))
    lines = ["".join(f"<td{kind[i]}>{_cell(cell)}</td>" for i, cell in enumerate(row)) for row in body]
    return f'<div class="scroll"><table><tr>{head}</tr>{"".join(f"<tr>{line}</tr>" for line in lines)}</table></div>'


def _cell(value: str | int | float) -> str:
    if isinstance(value, str):
        return escape(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.3f}"


def histogram(values: ArrayLike, label: str, marks: Sequence[tuple[float, str]] = (), *, num_bins: int = 40) -> str:
    """Bars of how often values occur, as SVG.

    Args:
        values: Any number of numbers.
        label: Under the axis; markup.
        marks: Values at which a line with a text stands, such as a limit; one beyond the largest value is left out.
        num_bins: Bars at most.
    """
    numbers = np.asarray(values, dtype=np.float64)
    if numbers.size == 0:
        return ""
    low, high = float(numbers.min()), float(numbers.max())
    counts, edges = np.histogram(numbers, bins=min(num_bins, max(1, int(high - low))), range=(low, max(high, low + 1)))
    width, height, bottom = 640, 150, 170
    scale = width / (edges[-1] - edges[0])
    step, top = width / len(counts), int(counts.max())
    bars = "".join(
        f'<rect class="bar" x="{i * step:.1f}" y="{height - count * (height - 10) / top:.1f}" width="{max(1.0, step - 1):.1f}" '
        f'height="{count * (height - 10) / top:.1f}"><title>{edges[i]:.0f} – {edges[i + 1]:.0f}: {count}</title></rect>'
        for i, count in enumerate(counts)
    )
    lines = "".join(
        f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{height}"/>'
        f'<text class="mark" x="{x - 4 if x > width / 2 else x + 4:.1f}" y="10" text-anchor="{"end" if x > width / 2 else "start"}">'
        f"{escape(text)}</text>"
        for value, text in marks
        if 0 <= (x := (value - edges[0]) * scale) <= width
    )
    ends = (
        f'<text x="0" y="{bottom - 4}">{edges[0]:,.0f}</text><text x="{width}" y="{bottom - 4}" text-anchor="end">{edges[-1]:,.0f}</text>'
    )
    drawing = f'<svg viewBox="0 0 {width} {bottom}" width="{width}" role="img">{bars}{lines}{ends}</svg>'
    return f'<figure style="margin:1rem 0"><div class="scroll">{drawing}</div><figcaption class="quiet">{label}</figcaption></figure>'


def image(content: bytes, kind: str = "jpeg") -> str:
    """A picture inside the page."""
    return f'<img alt="" src="data:image/{kind};base64,{base64.b64encode(content).decode()}">'
