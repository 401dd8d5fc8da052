"""What was found in a data set: a page with pictures, and a summary for the terminal."""

from __future__ import annotations

from html import escape

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from vlmcap.data.inspection import Broken, Entry, Inspection, SplitReport, as_jpeg
from vlmcap.reporting.pages import Row, both, histogram, image, page, table

_MOST_ROWS = 200  # of a table of the page
_MOST_LINES = 5  # of an enumeration on the terminal


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
    return page("Data check", "데이터 점검", "\n".join(part for part in parts if part))


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
    _enumerate(console, "Captions that stand at several clips", [f"{len(rows)} × {text[:70]}" for text, rows in report.same_captions])
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
        both("split", "분할"),
        both("clips", "클립"),
        both("captions", "캡션"),
        both("characters, mean", "글자 수 평균"),
        both("longest", "최대"),
    ]
    header += [both(f"{llm} tokens, mean", f"{llm} 토큰 평균"), both("longest", "최대"), both(f"cut at {limit}", f"{limit}에서 잘림")]
    shown = table(header, _rows(report, limit))
    return f"<h2>{both('Clips and captions', '클립과 캡션')}</h2>{shown}" + (f'<p class="quiet">{escape(note)}</p>' if note else "")


def _lengths(report: Inspection, llm: str, limit: int) -> str:
    splits = list(report.splits.values())
    drawn = histogram(np.concatenate([split.characters for split in splits]), both("characters a caption", "캡션당 글자 수"))
    if all(split.tokens is not None for split in splits):
        tokens = np.concatenate([_tokens(split) for split in splits])
        drawn += histogram(tokens, both(f"{llm} tokens a caption", f"캡션당 {llm} 토큰 수"), [(limit, f"llm.max_caption_tokens={limit}")])
    return f"<h2>{both('Lengths', '길이')}</h2>{drawn}"


def _tokens(split: SplitReport) -> NDArray[np.int32]:
    assert split.tokens is not None
    return split.tokens


def _leaks(report: Inspection) -> str:
    if not report.num_decoded:
        return ""
    head = f"<h2>{both('Clips that look alike', '비슷해 보이는 클립')}</h2>"
    if not report.look_alikes:
        return head + f"<p>{both('None among the videos read.', '읽은 영상 중에는 없습니다.')}</p>"
    across = both(f"{len(report.leaks)} groups lie across splits.", f"분할을 넘는 묶음: {len(report.leaks)}개")
    rows = [
        [", ".join(_name(entry) for entry in group)] for group in sorted(report.look_alikes, key=lambda group: group not in report.leaks)
    ]
    return head + f"<p>{across}</p>" + table([both("clips", "클립")], rows[:_MOST_ROWS]) + _more(len(rows))


def _broken(broken: list[Broken]) -> str:
    head = f"<h2>{both('What cannot be used', '쓸 수 없는 것')}</h2>"
    if not broken:
        return head + f"<p>{both('Nothing.', '없습니다.')}</p>"
    header = [both("clip", "클립"), both("file", "파일"), both("why", "이유")]
    rows = [[_name(row.entry), row.entry.video, row.reason] for row in broken]
    return head + table(header, rows[:_MOST_ROWS]) + _more(len(rows))


def _same_captions(report: Inspection) -> str:
    if not report.same_captions:
        return ""
    header = [both("times", "횟수"), both("caption", "캡션"), both("clips", "클립")]
    rows: list[Row] = [(len(entries), text, ", ".join(_name(entry) for entry in entries[:10])) for text, entries in report.same_captions]
    title = both("Captions that stand at several clips", "여러 클립에 쓰인 캡션")
    return f"<h2>{title}</h2>" + table(header, rows[:_MOST_ROWS]) + _more(len(rows))


def _samples(report: Inspection) -> str:
    if not report.samples:
        return ""
    shown = "".join(
        f'<div class="clip"><div>{"".join(image(as_jpeg(frame)) for frame in frames)}</div><p class="quiet">{escape(_name(entry))}'
        f"{' · ' + escape(clip.category) if clip.category else ''}</p>{''.join(f'<p>{escape(text)}</p>' for text in clip.captions)}</div>"
        for entry, clip, frames in report.samples
    )
    return f"<h2>{both('Some clips', '클립 보기')}</h2>{shown}"


def _name(entry: Entry) -> str:
    return f"{entry.split}/{entry.id}" if entry.split else entry.id


def _more(count: int) -> str:
    if count <= _MOST_ROWS:
        return ""
    return f'<p class="quiet">{both(f"… and {count - _MOST_ROWS:,} more", f"… 외 {count - _MOST_ROWS:,}개")}</p>'
