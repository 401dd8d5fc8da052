"""`vlmcap report`: compares runs and writes a page, tables and pictures."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from vlmcap import __version__
from vlmcap.compose import read_yaml
from vlmcap.config_saved import override_values
from vlmcap.errors import UserError
from vlmcap.files import write_text
from vlmcap.locks import claimed_folder
from vlmcap.reporting.report.analysis import Wanted, analyse
from vlmcap.reporting.report.folders import find_runs, read_run
from vlmcap.reporting.report.page import read_all_frames, report_page
from vlmcap.reporting.report.pictures import draw_curves, draw_fronts, draw_leaderboard
from vlmcap.reporting.report.records import Report
from vlmcap.reporting.report.tables import conclusion, leaderboard_csv, report_markdown, show_report
from vlmcap.terminal import transient_bar


def run(options: Namespace) -> None:
    """Writes the report, and prints its leaderboard and its conclusion in the last line.

    Raises:
        UserError: There is no run, no run has the metric, or the folder cannot be created.
    """
    given = override_values(options.overrides, program="vlmcap report", read=("monitor", "evaluation.tokenizer"))
    metric, tokenizer = options.metric or given.get("monitor"), options.tokenizer or given.get("evaluation.tokenizer")
    # A flag goes before its KEY=VALUE form.
    wanted = Wanted(metric, options.title, options.clips, tokenizer)
    report = make_report(options.folders, options.output, wanted)
    show_report(report)
    print(f"{options.output / 'index.html'}: {len(report.runs)} runs. {conclusion(report)}")


def make_report(folders: Sequence[Path], output: Path, wanted: Wanted) -> Report:
    """Reads runs, compares them and writes the report.

    Args:
        folders: Folders of runs or of sweeps.
        output: Folder to create; files of an earlier report in it are replaced.
        wanted: Metric, title, number of clips and tokenizer.

    Raises:
        UserError: There is no run, no run has the metric, or the folder cannot be created.
    """
    paths = find_runs(folders)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--output: the folder {output} cannot be created ({error.strerror}); choose another one"
        ) from error
    with claimed_folder(output, "--output"):
        # Each run counts twice: reading it, and analysing it.
        with transient_bar("Reading runs", 2 * len(paths)) as advance:
            runs = []
            for path in paths:
                runs.append(read_run(path, read_yaml))
                advance()
            report = analyse(runs, wanted, version=__version__, advance=advance)
        _write(report, output)
    return report


def _write(report: Report, output: Path) -> None:
    with transient_bar("Reading videos", len(report.clips)) as advance:
        # Frames are read last, as they take longest.
        pictures = read_all_frames(report.clips, advance=advance)
    write_text(output / "index.html", report_page(report, pictures))
    # The byte order mark lets spreadsheets read Korean.
    write_text(output / "leaderboard.csv", "\ufeff" + leaderboard_csv(report))
    write_text(output / "report.md", report_markdown(report))
    for name, draw in (("leaderboard", draw_leaderboard), ("pareto", draw_fronts), ("curves", draw_curves)):
        draw(report, output / f"{name}.png")
