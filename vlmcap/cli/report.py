"""`vlmcap report`: which of many runs to take."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from vlmcap.errors import UserError


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
    from vlmcap.build.report import show
    from vlmcap.reporting.report.analysis import Wanted

    show(options.folders, options.output, Wanted(options.metric, options.title, options.clips, options.tokenizer))
