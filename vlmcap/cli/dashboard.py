"""`vlmcap dashboard`: the W&B workspace that compares runs, and the file of a W&B sweep."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from vlmcap.errors import UserError


def add(commands: Any) -> None:
    """Adds the command to the parsers of argparse."""
    text = "the Weights & Biases dashboard that compares runs, and sweeps for W&B's agents"
    parser = commands.add_parser("dashboard", help=text, description=text[0].upper() + text[1:] + ".")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="with --sweep: as of train.py -m, such as encoder=clip,siglip2")
    parser.add_argument("--project", default="vlmcap", metavar="P", help="W&B project, as logger.project (default: vlmcap)")
    parser.add_argument("--entity", metavar="E", help="user or team that has the project (default: that of the key)")
    parser.add_argument("--objective", default="val/cider", metavar="NAME", help="score to compare by (default: val/cider)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the definition to a file and publish nothing")
    parser.add_argument("--sweep", type=Path, metavar="FILE", help="write a sweep of the overrides for `wandb sweep` to a file")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    if options.sweep:
        from vlmcap.build.wandb_sweep import write_sweep

        write_sweep(options.overrides, options.sweep, project=options.project, entity=options.entity)
        return
    if options.overrides:
        raise UserError(f"{options.overrides[0]} is of a sweep; add --sweep FILE, or leave it out")
    from vlmcap.build.dashboard import show_dashboard

    show_dashboard(options.project, options.entity, objective=options.objective, file=options.json)
