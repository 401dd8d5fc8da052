"""`vlmcap data`: a data set, looked at before anything is trained on it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add(commands: Any) -> None:
    """Adds the command to the parsers of argparse."""
    parser = commands.add_parser("data", help="look at a data set before training on it")
    actions = parser.add_subparsers(title="actions", required=True, metavar="ACTION")
    check = actions.add_parser(
        "check",
        help="count clips and captions, find broken files and duplicates, and write a page with pictures",
        description="Count clips and captions, find broken files, captions that will be cut and clips that look alike, and write a page.",
    )
    check.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as of train.py, such as data=aihub data.root=… llm=qwen3_8b")
    check.add_argument("--output", type=Path, default=Path("data-check.html"), metavar="FILE", help="the page (default: data-check.html)")
    check.add_argument("--max-clips", type=int, metavar="N", help="read the videos of the first N clips of each split only")
    check.add_argument("--captions-only", action="store_true", help="read no video")
    check.set_defaults(run=_check)


def _check(options: argparse.Namespace) -> None:
    from vlmcap.build.data_check import check_data
    from vlmcap.errors import UserError

    if options.max_clips is not None and options.max_clips < 1:
        raise UserError(f"--max-clips must be at least 1, not {options.max_clips}")
    check_data(options.overrides, options.output, max_clips=options.max_clips, reads_videos=not options.captions_only)
