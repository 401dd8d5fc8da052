"""Results of a data check as a page with pictures, and as a summary for the terminal.

The page is a single HTML file that needs no network, in English and Korean, with a light and a dark theme.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape

import numpy as np
from numpy.typing import ArrayLike, NDArray
from rich.console import Console
from rich.table import Table

from vlmcap.data.inspection import Broken, Entry, Inspection, as_jpeg

_MAX_ROWS = 200  # rows of a table on the page
_MAX_LINES = 5  # lines of a list on the terminal
Row = Sequence[str | int | float]

_STYLE = """
:root { color-scheme: light dark; --text: #1b1f24; --muted: #59636e; --back: #ffffff; --line: #d1d9e0;
  --bar: #2f6feb; --mark: #d1242f; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e6edf3; --muted: #9198a1; --back: #0d1117; --line: #3d444d; --bar: #4493f8; --mark: #f85149; } }
body { font: 15px/1.55 system-ui, "Noto Sans KR", "Malgun Gothic", sans-serif; color: var(--text);
  background: var(--back); max-width: 1100px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; }
h2 { font-size: 1.15rem; margin-top: 2.2rem; border-bottom: 1px solid var(--line); padding-bottom: .3rem; }
table { border-collapse: collapse; }
th, td { padding: .3rem .8rem .3rem 0; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
.muted { color: var(--muted); } .scroll { overflow-x: auto; }
.clip { margin: 1.2rem 0; padding-bottom: 1rem; border-bottom: 1px solid var(--line); }
.clip img { height: 90px; margin-right: 4px; } .clip p { margin: .4rem 0; max-width: 70ch; }
button { float: right; font: inherit; color: inherit; background: none; border: 1px solid var(--line);
  border-radius: 6px; padding: .2rem .7rem; cursor: pointer; }
svg text { fill: var(--muted); font-size: 11px; } svg .bar { fill: var(--bar); } svg .mark { stroke: var(--mark); }
svg text.mark { fill: var(--mark); stroke: none; }
html[data-language=en] [lang=ko], html[data-language=ko] [lang=en] { display: none; }
"""
_SCRIPT = """
const root = document.documentElement;
root.dataset.language = (navigator.language || "").startsWith("ko") ? "ko" : "en";
document.getElementById("language").onclick = () => {
  root.dataset.language = root.dataset.language === "ko" ? "en" : "ko";
};
"""


def data_page(report: Inspection, *, title: str, llm: str, limit: int, note: str) -> str:
    """Returns the page as HTML.

    Args:
        report: Results of the data check.
        title: Name of the data set.
        llm: Name of the language model whose tokens are counted.
        limit: Number of tokens to which training captions are truncated.
        note: Why tokens were not counted; empty if they were.
    """
    parts = [f'<p class="muted">{escape(title)}</p>', _overview(report, llm, limit, note), _lengths(report, llm, limit)]
    parts += [_leaks(report), _broken(report.broken), _same_captions(report), _samples(report)]
    return _page("Data check", "데이터 점검", "\n".join(part for part in parts if part))


def show_inspection(report: Inspection, *, llm: str, limit: int, note: str) -> None:
    """Prints the summary; the arguments are those of `data_page`."""
    overview = Table(title="Clips and captions", title_justify="left", title_style="bold", caption_justify="left")
    overview.add_column("split")
    for column in ("clips", "captions", "mean characters", "max", "mean tokens", "max", "truncated"):
        overview.add_column(column, justify="right")
    for row in _rows(report, limit):
        overview.add_row(*(cell if isinstance(cell, str) else f"{cell:,}" for cell in row))
    if not note:
        overview.caption = f"tokens of llm={llm}; training truncates captions to llm.max_caption_tokens={limit}"
    console = Console()
    console.print(overview)
    if note:
        console.print(f"Note: {note}", style="yellow", markup=False, highlight=False)
    lines = [f"{entry.entry.split or 'label'} {entry.entry.id}: {entry.reason}" for entry in report.broken]
    _print_list(console, "Clips or labels that cannot be used", lines)
    leaks = [" = ".join(f"{entry.split}/{entry.id}" for entry in group) for group in report.leaks]
    _print_list(console, "Groups of similar clips in different splits, which would make scores too good", leaks)
    repeated = [f"{len(entries)} × {text[:70]}" for text, entries in report.same_captions]
    _print_list(console, "Captions used by several clips", repeated)
    # Only if videos were read: without them, nothing is known of their state.
    if report.num_decoded and not (report.broken or leaks):
        console.print(f"All {report.num_decoded:,} videos can be used, and none is similar to one of another split.")


def _print_list(console: Console, title: str, lines: list[str]) -> None:
    if lines:
        more = [f"  … and {len(lines) - _MAX_LINES:,} more"] if len(lines) > _MAX_LINES else []
        text = "\n".join([f"{title}: {len(lines):,}", *(f"  {line}" for line in lines[:_MAX_LINES]), *more])
        console.print(text, markup=False, highlight=False)


def _rows(report: Inspection, limit: int) -> list[list[str | int]]:
    """Returns a row per split: clips, captions, characters (mean, max), tokens (mean, max), truncated captions."""
    rows: list[list[str | int]] = []
    for name, split in report.splits.items():
        tokens: list[str | int] = ["–", "–", "–"]
        if split.tokens is not None:
            tokens = [*_mean_and_max(split.tokens), int((split.tokens > limit).sum())]
        rows.append([name, split.num_clips, split.num_captions, *_mean_and_max(split.characters), *tokens])
    return rows


def _mean_and_max(values: NDArray[np.int64] | NDArray[np.int32]) -> list[int]:
    return [round(float(values.mean())), int(values.max())] if len(values) else [0, 0]


def _overview(report: Inspection, llm: str, limit: int, note: str) -> str:
    header = [
        _bilingual("split", "분할"),
        _bilingual("clips", "클립"),
        _bilingual("captions", "캡션"),
        _bilingual("mean characters", "평균 글자 수"),
        _bilingual("max", "최대"),
        _bilingual(f"mean {llm} tokens", f"평균 {llm} 토큰 수"),
        _bilingual("max", "최대"),
        _bilingual(f"truncated to {limit}", f"{limit}토큰에서 잘림"),
    ]
    shown = _table(header, _rows(report, limit))
    return f"<h2>{_bilingual('Clips and captions', '클립과 캡션')}</h2>{shown}" + (
        f'<p class="muted">{escape(note)}</p>' if note else ""
    )


def _lengths(report: Inspection, llm: str, limit: int) -> str:
    splits = list(report.splits.values())
    drawn = _histogram(
        np.concatenate([split.characters for split in splits]), _bilingual("characters per caption", "캡션당 글자 수")
    )
    tokens = [split.tokens for split in splits if split.tokens is not None]
    if len(tokens) == len(splits):
        drawn += _histogram(
            np.concatenate(tokens),
            _bilingual(f"{llm} tokens per caption", f"캡션당 {llm} 토큰 수"),
            [(limit, f"llm.max_caption_tokens={limit}")],
        )
    return f"<h2>{_bilingual('Lengths', '길이')}</h2>{drawn}"


def _leaks(report: Inspection) -> str:
    if not report.num_decoded:
        return ""
    head = f"<h2>{_bilingual('Similar clips', '비슷한 클립')}</h2>"
    if not report.look_alikes:
        return head + f"<p>{_bilingual('None among the videos read.', '읽은 영상 중에는 없습니다.')}</p>"
    across = _bilingual(f"Groups across splits: {len(report.leaks)}.", f"여러 분할에 걸친 묶음: {len(report.leaks)}개")
    rows = [
        [", ".join(_name(entry) for entry in group)]
        # Groups across splits first, as these make scores too good.
        for group in sorted(report.look_alikes, key=lambda group: group not in report.leaks)
    ]
    return head + f"<p>{across}</p>" + _table([_bilingual("clips", "클립")], rows[:_MAX_ROWS]) + _more(len(rows))


def _broken(broken: list[Broken]) -> str:
    head = f"<h2>{_bilingual('Clips that cannot be used', '사용할 수 없는 클립')}</h2>"
    if not broken:
        return head + f"<p>{_bilingual('None.', '없습니다.')}</p>"
    header = [_bilingual("clip", "클립"), _bilingual("file", "파일"), _bilingual("reason", "이유")]
    rows = [[_name(row.entry), row.entry.video, row.reason] for row in broken]
    return head + _table(header, rows[:_MAX_ROWS]) + _more(len(rows))


def _same_captions(report: Inspection) -> str:
    if not report.same_captions:
        return ""
    header = [_bilingual("times", "횟수"), _bilingual("caption", "캡션"), _bilingual("clips", "클립")]
    rows: list[Row] = [
        (len(entries), text, ", ".join(_name(entry) for entry in entries[:10]))
        for text, entries in report.same_captions
    ]
    title = _bilingual("Captions used by several clips", "여러 클립에 쓰인 캡션")
    return f"<h2>{title}</h2>" + _table(header, rows[:_MAX_ROWS]) + _more(len(rows))


def _samples(report: Inspection) -> str:
    if not report.samples:
        return ""
    shown = []
    for entry, clip, frames in report.samples:
        images = "".join(_image(as_jpeg(frame)) for frame in frames)
        name = escape(" · ".join(filter(None, (_name(entry), clip.category))))
        captions = "".join(f"<p>{escape(text)}</p>" for text in clip.captions)
        shown.append(f'<div class="clip"><div>{images}</div><p class="muted">{name}</p>{captions}</div>')
    return f"<h2>{_bilingual('Sample clips', '예시 클립')}</h2>{''.join(shown)}"


def _name(entry: Entry) -> str:
    return f"{entry.split}/{entry.id}" if entry.split else entry.id


def _more(count: int) -> str:
    if count <= _MAX_ROWS:
        return ""
    return f'<p class="muted">{_bilingual(f"… and {count - _MAX_ROWS:,} more", f"… 외 {count - _MAX_ROWS:,}개")}</p>'


def _bilingual(english: str, korean: str) -> str:
    """Returns markup with a text in both languages, of which the page shows one; the texts are escaped."""
    return f'<span lang="en">{escape(english)}</span><span lang="ko">{escape(korean)}</span>'


def _page(title: str, korean_title: str, body: str) -> str:
    """Returns the whole page; `body` is markup."""
    return (
        f'<!doctype html>\n<html lang="en" data-language="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{escape(title)}</title>'
        f'<link rel="icon" href="data:,"><style>{_STYLE}</style></head>\n<body>'
        '<button id="language" '
        f'type="button">{_bilingual("한국어", "English")}</button><h1>{_bilingual(title, korean_title)}</h1>\n'
        f"{body}\n<script>{_SCRIPT}</script></body></html>\n"
    )


def _table(header: Sequence[str], rows: Iterable[Row]) -> str:
    """Returns a table; header cells are markup, other cells are escaped, and numbers are right-aligned."""
    body = [list(row) for row in rows]
    # A column is right-aligned if all of its cells are numbers.
    is_number = [bool(body) and all(isinstance(row[i], int | float) for row in body) for i in range(len(header))]
    kind = [' class="number"' if number else "" for number in is_number]
    head = "".join(f"<th{kind[i]}>{cell}</th>" for i, cell in enumerate(header))
    lines = ["".join(f"<td{kind[i]}>{_cell(cell)}</td>" for i, cell in enumerate(row)) for row in body]
    return f'<div class="scroll"><table><tr>{head}</tr>{"".join(f"<tr>{line}</tr>" for line in lines)}</table></div>'


def _cell(value: str | int | float) -> str:
    if isinstance(value, str):
        return escape(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.3f}"


def _histogram(values: ArrayLike, label: str, marks: Sequence[tuple[float, str]] = (), *, num_bins: int = 40) -> str:
    """Returns a histogram as SVG.

    Args:
        values: Numbers to count.
        label: Markup below the axis.
        marks: Values and texts of vertical lines, such as a limit; a line beyond the largest value is not drawn.
        num_bins: Maximum number of bars.
    """
    numbers = np.asarray(values, dtype=np.float64)
    if numbers.size == 0:
        return ""
    low, high = float(numbers.min()), float(numbers.max())
    # Bars are at least 1 wide, since the numbers are counts; equal numbers make one bar.
    counts, edges = np.histogram(numbers, bins=min(num_bins, max(1, int(high - low))), range=(low, max(high, low + 1)))
    width, height, bottom = 640, 150, 170
    # Pixels: bars stand on a line at `height`, and the numbers at both ends of the axis are below it.
    scale = width / (edges[-1] - edges[0])
    # Width of a bar, and height of the tallest one in clips.
    step, top = width / len(counts), int(counts.max())
    bars = "".join(
        f'<rect class="bar" x="{i * step:.1f}" y="{height - count * (height - 10) / top:.1f}" '
        f'width="{max(1.0, step - 1):.1f}" '
        f'height="{count * (height - 10) / top:.1f}"><title>{edges[i]:.0f} – {edges[i + 1]:.0f}: {count}</title></rect>'
        for i, count in enumerate(counts)
    )
    lines = "".join(
        f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{height}"/>'
        # The label of a mark stands on the side with more room.
        f'<text class="mark" x="{x - 4 if x > width / 2 else x + 4:.1f}" y="10" '
        f'text-anchor="{"end" if x > width / 2 else "start"}">'
        f"{escape(text)}</text>"
        for value, text in marks
        if 0 <= (x := (value - edges[0]) * scale) <= width
    )
    ends = (
        f'<text x="0" y="{bottom - 4}">{edges[0]:,.0f}</text>'
        f'<text x="{width}" y="{bottom - 4}" text-anchor="end">{edges[-1]:,.0f}</text>'
    )
    drawing = f'<svg viewBox="0 0 {width} {bottom}" width="{width}" role="img">{bars}{lines}{ends}</svg>'
    caption = f'<figcaption class="muted">{label}</figcaption>'
    return f'<figure style="margin:1rem 0"><div class="scroll">{drawing}</div>{caption}</figure>'


def _image(jpeg: bytes) -> str:
    """Returns an image element that contains the JPEG file itself."""
    return f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}">'
