"""What was found in a data set: a page with pictures, and a summary for the terminal.

The page is one file of HTML that needs no network, light and dark, in English and Korean.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape

import numpy as np
from numpy.typing import ArrayLike, NDArray
from rich.console import Console
from rich.table import Table

from vlmcap.data.inspection import Broken, Entry, Inspection, SplitReport, as_jpeg

_MOST_ROWS = 200  # of a table of the page
_MOST_LINES = 5  # of an enumeration on the terminal
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


def data_page(report: Inspection, *, title: str, llm: str, limit: int, note: str) -> str:
    """The page, as HTML.

    Args:
        report: What was found.
        title: Of the data set.
        llm: Name of the language model whose tokens are counted.
        limit: Tokens at which a training caption is cut.
        note: Why tokens were not counted; empty if they were.
    """
    parts = [f'<p class="quiet">{escape(title)}</p>', _overview(report, llm, limit, note), _lengths(report, llm, limit)]
    parts += [_leaks(report), _broken(report.broken), _same_captions(report), _samples(report)]
    return _page("Data check", "데이터 점검", "\n".join(part for part in parts if part))


def show_inspection(report: Inspection, *, llm: str, limit: int, note: str) -> None:
    """Prints the summary; arguments as of `data_page`."""
    overview = Table(title="Clips and captions", title_justify="left", title_style="bold", caption_justify="left")
    overview.add_column("split")
    for column in ("clips", "captions", "characters", "at most", "tokens", "at most", "cut"):
        overview.add_column(column, justify="right")
    for row in _rows(report, limit):
        overview.add_row(*(cell if isinstance(cell, str) else f"{cell:,}" for cell in row))
    if not note:
        overview.caption = f"tokens of llm={llm}, cut at llm.max_caption_tokens={limit}"
    console = Console()
    console.print(overview)
    if note:
        console.print(f"Note: {note}", style="yellow", markup=False, highlight=False)
    lines = [f"{entry.entry.split or 'label'} {entry.entry.id}: {entry.reason}" for entry in report.broken]
    _enumerate(console, "Clips or labels that cannot be used", lines)
    leaks = [" = ".join(f"{entry.split}/{entry.id}" for entry in group) for group in report.leaks]
    _enumerate(console, "Groups of clips that look alike in different splits, so that scores would be too good", leaks)
    _enumerate(
        console,
        "Captions that stand at several clips",
        [f"{len(rows)} × {text[:70]}" for text, rows in report.same_captions],
    )
    if report.num_decoded and not (report.broken or leaks):
        console.print(f"All {report.num_decoded:,} videos read can be used, and none looks like one of another split.")


def _enumerate(console: Console, what: str, lines: list[str]) -> None:
    if lines:
        more = [f"  … and {len(lines) - _MOST_LINES:,} more"] if len(lines) > _MOST_LINES else []
        text = "\n".join([f"{what}: {len(lines):,}", *(f"  {line}" for line in lines[:_MOST_LINES]), *more])
        console.print(text, markup=False, highlight=False)


def _rows(report: Inspection, limit: int) -> list[list[str | int]]:
    """A split a row: clips, captions, characters, tokens, captions cut."""
    rows: list[list[str | int]] = []
    for name, split in report.splits.items():
        tokens: list[str | int] = ["–", "–", "–"]
        if split.tokens is not None:
            tokens = [*_mean_and_most(split.tokens), int((split.tokens > limit).sum())]
        rows.append([name, split.num_clips, split.num_captions, *_mean_and_most(split.characters), *tokens])
    return rows


def _mean_and_most(values: NDArray[np.int64] | NDArray[np.int32]) -> list[int]:
    return [round(float(values.mean())), int(values.max())] if len(values) else [0, 0]


def _overview(report: Inspection, llm: str, limit: int, note: str) -> str:
    header = [
        _both("split", "분할"),
        _both("clips", "클립"),
        _both("captions", "캡션"),
        _both("characters, mean", "글자 수 평균"),
        _both("longest", "최대"),
    ]
    header += [
        _both(f"{llm} tokens, mean", f"{llm} 토큰 평균"),
        _both("longest", "최대"),
        _both(f"cut at {limit}", f"{limit}에서 잘림"),
    ]
    shown = _table(header, _rows(report, limit))
    return f"<h2>{_both('Clips and captions', '클립과 캡션')}</h2>{shown}" + (
        f'<p class="quiet">{escape(note)}</p>' if note else ""
    )


def _lengths(report: Inspection, llm: str, limit: int) -> str:
    splits = list(report.splits.values())
    drawn = _histogram(
        np.concatenate([split.characters for split in splits]), _both("characters a caption", "캡션당 글자 수")
    )
    if all(split.tokens is not None for split in splits):
        tokens = np.concatenate([_tokens(split) for split in splits])
        drawn += _histogram(
            tokens,
            _both(f"{llm} tokens a caption", f"캡션당 {llm} 토큰 수"),
            [(limit, f"llm.max_caption_tokens={limit}")],
        )
    return f"<h2>{_both('Lengths', '길이')}</h2>{drawn}"


def _tokens(split: SplitReport) -> NDArray[np.int32]:
    assert split.tokens is not None
    return split.tokens


def _leaks(report: Inspection) -> str:
    if not report.num_decoded:
        return ""
    head = f"<h2>{_both('Clips that look alike', '비슷해 보이는 클립')}</h2>"
    if not report.look_alikes:
        return head + f"<p>{_both('None among the videos read.', '읽은 영상 중에는 없습니다.')}</p>"
    across = _both(f"{len(report.leaks)} groups lie across splits.", f"분할을 넘는 묶음: {len(report.leaks)}개")
    rows = [
        [", ".join(_name(entry) for entry in group)]
        for group in sorted(report.look_alikes, key=lambda group: group not in report.leaks)
    ]
    return head + f"<p>{across}</p>" + _table([_both("clips", "클립")], rows[:_MOST_ROWS]) + _more(len(rows))


def _broken(broken: list[Broken]) -> str:
    head = f"<h2>{_both('What cannot be used', '쓸 수 없는 것')}</h2>"
    if not broken:
        return head + f"<p>{_both('Nothing.', '없습니다.')}</p>"
    header = [_both("clip", "클립"), _both("file", "파일"), _both("why", "이유")]
    rows = [[_name(row.entry), row.entry.video, row.reason] for row in broken]
    return head + _table(header, rows[:_MOST_ROWS]) + _more(len(rows))


def _same_captions(report: Inspection) -> str:
    if not report.same_captions:
        return ""
    header = [_both("times", "횟수"), _both("caption", "캡션"), _both("clips", "클립")]
    rows: list[Row] = [
        (len(entries), text, ", ".join(_name(entry) for entry in entries[:10]))
        for text, entries in report.same_captions
    ]
    title = _both("Captions that stand at several clips", "여러 클립에 쓰인 캡션")
    return f"<h2>{title}</h2>" + _table(header, rows[:_MOST_ROWS]) + _more(len(rows))


def _samples(report: Inspection) -> str:
    if not report.samples:
        return ""
    shown = "".join(
        f'<div class="clip"><div>{"".join(_image(as_jpeg(frame)) for frame in frames)}</div><p '
        f'class="quiet">{escape(_name(entry))}'
        f"{' · ' + escape(clip.category) if clip.category else ''}</p>{''.join(f'<p>{escape(text)}</p>' for text in clip.captions)}</div>"
        for entry, clip, frames in report.samples
    )
    return f"<h2>{_both('Some clips', '클립 보기')}</h2>{shown}"


def _name(entry: Entry) -> str:
    return f"{entry.split}/{entry.id}" if entry.split else entry.id


def _more(count: int) -> str:
    if count <= _MOST_ROWS:
        return ""
    return f'<p class="quiet">{_both(f"… and {count - _MOST_ROWS:,} more", f"… 외 {count - _MOST_ROWS:,}개")}</p>'


def _both(english: str, korean: str) -> str:
    """A text in both languages, of which the page shows one; Markup, the texts are escaped."""
    return f'<span lang="en">{escape(english)}</span><span lang="ko">{escape(korean)}</span>'


def _page(title: str, korean_title: str, body: str) -> str:
    """A whole page; `body` is markup."""
    return (
        f'<!doctype html>\n<html lang="en" data-language="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{escape(title)}</title>'
        f'<link rel="icon" href="data:,"><style>{_STYLE}</style></head>\n<body>'
        '<button id="language" '
        f'type="button">{_both("한국어", "English")}</button><h1>{_both(title, korean_title)}</h1>\n'
        f"{body}\n<script>{_SCRIPT}</script></body></html>\n"
    )


def _table(header: Sequence[str], rows: Iterable[Row]) -> str:
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


def _histogram(values: ArrayLike, label: str, marks: Sequence[tuple[float, str]] = (), *, num_bins: int = 40) -> str:
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
        f'<rect class="bar" x="{i * step:.1f}" y="{height - count * (height - 10) / top:.1f}" '
        f'width="{max(1.0, step - 1):.1f}" '
        f'height="{count * (height - 10) / top:.1f}"><title>{edges[i]:.0f} – {edges[i + 1]:.0f}: {count}</title></rect>'
        for i, count in enumerate(counts)
    )
    lines = "".join(
        f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{height}"/>'
        f'<text class="mark" x="{x - 4 if x > width / 2 else x + 4:.1f}" y="10" '
        f'text-anchor="{"end" if x > width / 2 else "start"}">'
        f"{escape(text)}</text>"
        for value, text in marks
        if 0 <= (x := (value - edges[0]) * scale) <= width
    )
    ends = f'<text x="0" y="{bottom - 4}">{edges[0]:,.0f}</text><text x="{width}" y="{bottom - 4}" text-anchor="end">{edges[-1]:,.0f}</text>'
    drawing = f'<svg viewBox="0 0 {width} {bottom}" width="{width}" role="img">{bars}{lines}{ends}</svg>'
    return f'<figure style="margin:1rem 0"><div class="scroll">{drawing}</div><figcaption class="quiet">{label}</figcaption></figure>'


def _image(content: bytes, kind: str = "jpeg") -> str:
    """A picture inside the page."""
    return f'<img alt="" src="data:image/{kind};base64,{base64.b64encode(content).decode()}">'
