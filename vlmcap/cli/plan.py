"""`vlmcap plan`: what a configuration takes on its card, before anything is downloaded."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlmcap.compose import compose
from vlmcap.errors import UserError
from vlmcap.planning.grid.configs import grid_names
from vlmcap.planning.grid.grid import _bar, make_grid
from vlmcap.planning.make import NO_DATA, make_plan, with_changes
from vlmcap.planning.sweep_budget.sweep import plan_sweep


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
    from vlmcap.libraries import import_libraries

    if options.output and not options.grid:
        raise UserError("--output is the picture of --grid's table; add --grid, or leave it out")
    import_libraries(with_adapters=True, with_training=False)
    if options.multirun:
        if options.all:
            raise UserError("--all shows the memory of one combination; leave out -m")

        show_sweep(options.overrides, price=options.price, as_json=options.json)
        return
    if options.price is not None:
        raise UserError("--price is for a sweep; add -m")
    if options.grid:
        show_grid(options.overrides, as_json=options.json, output=options.output)
        return

    show_plan(options.overrides, as_json=options.json, is_whole=options.all)


def show_plan(overrides: Sequence[str], *, as_json: bool = False, is_whole: bool = False) -> None:
    """Prints the plan of a configuration, and exits with 1 where it does not fit.

    Args:
        overrides: As `train.py` takes them; data.root is not needed.
        as_json: As JSON.
        is_whole: Every part of the memory, small ones too.

    Raises:
        UserError: Something in the configuration does not do.
    """
    import json

    from vlmcap.libraries import quiet_libraries

    quiet_libraries()
    overrides = [NO_DATA, *overrides]
    plan = with_changes(make_plan(compose(overrides)), overrides)
    if as_json:
        print(json.dumps(plan.plain(), indent=2))
    else:
        from vlmcap.planning import plan_table

        plan_table.show_plan(plan, is_whole=is_whole)
    if not plan.fits:
        raise SystemExit(1)


def show_grid(overrides: Sequence[str], *, as_json: bool = False, output: Path | None = None) -> None:
    """Prints the table, and draws it where a file is named.

    Args:
        overrides: As `train.py` takes them; encoder, llm and hardware also several with commas, or all of conf/ where they are not named.
        as_json: As JSON.
        output: A PNG.

    Raises:
        UserError: Something in the configuration does not do.
    """
    import json
    import sys

    from vlmcap.libraries import quiet_libraries
    from vlmcap.planning.grid import table as grid_table

    quiet_libraries()
    names = grid_names([NO_DATA, *overrides])
    with _bar(sys.stderr.isatty() and not as_json) as advance:
        found = make_grid(names, advance=advance)
    if as_json:
        print(json.dumps([cell.plain() for cell in found], indent=2))
    else:
        grid_table.show_grid(found)
    if output:
        from vlmcap.planning.grid.picture import draw_grid

        draw_grid(found, output)


def show_sweep(overrides: Sequence[str], *, price: float | None = None, as_json: bool = False) -> None:
    """Prints what a sweep takes, and exits with 1 where nothing fits: no combination its card, or no proposal the budget.

    Args:
        overrides: As after `python train.py -m`.
        price: Of an hour of the card.
        as_json: As JSON.

    Raises:
        UserError: As `plan_sweep`.
    """
    from vlmcap.libraries import quiet_libraries

    quiet_libraries()
    if price is not None and not 0 <= price < float("inf"):
        raise UserError(f"--price must be what an hour costs, 0 or more, not {price}")
    plan = plan_sweep(overrides, price)
    if as_json:
        print(json.dumps(plan.plain(), indent=2, ensure_ascii=False))
    else:
        from vlmcap.planning.sweep_budget.table import show_budget

        show_budget(plan)
    if not plan.is_possible:
        raise SystemExit(1)
