"""`vlmcap plan`: what a configuration takes on its card, before anything is downloaded."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from vlmcap.errors import UserError


def add(commands: Any) -> None:
    """Adds the command to the parsers of argparse."""
    text = "peak memory, time and disk of a configuration, without weights, GPU or network"
    parser = commands.add_parser("plan", help=text, description=text[0].upper() + text[1:] + "; exit code 1 where it does not fit.")
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="as of train.py, such as encoder=siglip2 llm=qwen3_8b hardware=l4"
    )
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")
    parser.add_argument("--all", action="store_true", help="show every part of the memory, small ones too")
    parser.add_argument("-m", "--multirun", action="store_true", help="add up all combinations of a sweep, such as encoder=clip,siglip2")
    parser.add_argument("--price", type=float, metavar="X", help="with -m: what an hour of the card costs")
    parser.add_argument(
        "--grid", action="store_true", help="a table of all encoders, llms and cards, or of llm=qwen3_4b,qwen3_8b and so on"
    )
    parser.add_argument("--output", type=Path, metavar="PNG", help="draw the table of --grid, too")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    from vlmcap.build.quiet import import_libraries

    if options.output and not options.grid:
        raise UserError("--output is the picture of --grid's table; add --grid, or leave it out")
    import_libraries(with_adapters=True, with_training=False)
    if options.multirun:
        if options.all:
            raise UserError("--all shows the memory of one combination; leave out -m")
        from vlmcap.build.plan_sweep import show_sweep

        show_sweep(options.overrides, price=options.price, as_json=options.json)
        return
    if options.price is not None:
        raise UserError("--price is for a sweep; add -m")
    if options.grid:
        from vlmcap.build.plan_grid import show_grid

        show_grid(options.overrides, as_json=options.json, output=options.output)
        return
    from vlmcap.build.plan import show_plan

    show_plan(options.overrides, as_json=options.json, is_whole=options.all)
