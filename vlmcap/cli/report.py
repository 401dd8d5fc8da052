"""`vlmcap report`: which of many runs to take."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlmcap import __version__
from vlmcap.compose import read_yaml
from vlmcap.errors import UserError
from vlmcap.files import replacing
from vlmcap.reporting.report.analysis import Wanted, analyse
from vlmcap.reporting.report.data import Report
from vlmcap.reporting.report.folders import find_runs, read_run
from vlmcap.terminal import passing_bar


def add(commands: Any) -> None:
    """Adds the command to the parsers of argparse."""
    text = "compare runs: a page, tables and pictures with intervals and significance"
    parser = commands.add_parser("report", help=text, description=text[0].upper() + text[1:] + ".")
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="of a run, or of a sweep: multirun/<date>/<time>")
    parser.add_argument("--output", type=Path, default=Path("report"), metavar="DIR", help="where everything is written (default: report)")
    parser.add_argument(
        "--metric", metavar="NAME", help="by which runs are compared, such as test/cider (default: the objective that the runs name)"
    )
    parser.add_argument("--title", metavar="TEXT", help="of the page (default: the folders)")
    parser.add_argument("--clips", type=int, default=40, metavar="N", help="clips shown with all captions side by side (default: 40)")
    parser.add_argument("--tokenizer", metavar="NAME", help="score all captions anew with this tokeniser, where runs used different ones")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    if options.clips < 0:
        raise UserError(f"--clips must be 0 or more, not {options.clips}")
    from vlmcap.reporting.report.analysis import Wanted

    show(options.folders, options.output, Wanted(options.metric, options.title, options.clips, options.tokenizer))


def make_report(folders: Sequence[Path], output: Path, wanted: Wanted) -> Report:
    """Reads runs, compares them and writes everything.

    Args:
        folders: Of runs, or of sweeps.
        output: A folder that is made; files of an earlier report in it are replaced.
        wanted: Metric, title and sizes.

    Raises:
        UserError: There is no run, no run has the metric, or the folder cannot be made.
    """
    paths = find_runs(folders)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {output} cannot be made a folder: {error.strerror}") from error
    with passing_bar("Reading runs", 2 * len(paths)) as advance:
        runs = []
        for path in paths:
            runs.append(read_run(path, read_yaml))
            advance()
        report = analyse(runs, wanted, version=__version__, advance=advance)
    _write(report, output)
    return report


def show(folders: Sequence[Path], output: Path, wanted: Wanted) -> None:
    """Makes the report and prints its leaderboard, and in the last line what came out.

    Raises:
        UserError: As `make_report`.
    """
    from vlmcap.reporting.report.tables import conclusion, show_report

    report = make_report(folders, output, wanted)
    show_report(report)
    print(f"{output / 'index.html'}: {len(report.runs)} runs. {conclusion(report)}")


def _write(report: Report, output: Path) -> None:
    from vlmcap.reporting.report.page import pictures_of, report_page
    from vlmcap.reporting.report.pictures import draw_curves, draw_fronts, draw_leaderboard
    from vlmcap.reporting.report.tables import leaderboard_csv, report_markdown

    with passing_bar("Reading videos", len(report.clips)) as advance:
        pictures = pictures_of(report.clips, advance=advance)
    _write_text(output / "index.html", report_page(report, pictures))
    _write_text(output / "leaderboard.csv", "\ufeff" + leaderboard_csv(report))  # the mark lets spreadsheets read Korean
    _write_text(output / "report.md", report_markdown(report))
    for name, draw in (("leaderboard", draw_leaderboard), ("pareto", draw_fronts), ("curves", draw_curves)):
        draw(report, output / f"{name}.png")


def _write_text(path: Path, text: str) -> None:
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")
