"""`vlmcap plan`: estimates the memory, time and disk of a configuration before anything is downloaded."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from vlmcap.config_unread import NO_DATA, check_single_run
from vlmcap.libraries import silence_libraries
from vlmcap.planning.changes import with_changes
from vlmcap.planning.grid.grid_table import draw_grid, show_grid
from vlmcap.planning.grid.make_grid import grid_names, make_grid
from vlmcap.planning.known_data import known_captions, known_clips, planned
from vlmcap.planning.make_plan import make_plan
from vlmcap.planning.plan import show_plan
from vlmcap.planning.sweep_budget.make_sweep_plan import plan_sweep
from vlmcap.planning.sweep_budget.sweep_plan import show_budget


def run(options: Namespace) -> None:
    """Prints the plan of a configuration, of a sweep, or of a table of combinations.

    Raises:
        UserError: An override is invalid, or components do not fit together.
        SystemExit: With code 1 if the configuration does not fit its GPU, or neither the sweep nor any proposed change
            keeps to its budget.
    """
    silence_libraries()
    if options.multirun:
        _sweep(options.overrides, options.price, as_json=options.json)
    elif options.grid:
        _grid(options.overrides, options.output, as_json=options.json)
    else:
        _one(options.overrides, as_json=options.json, shows_all=options.all)


def _one(overrides: Sequence[str], *, as_json: bool, shows_all: bool) -> None:
    # A plan needs no data set; captions of a known one make it more exact.
    overrides = [NO_DATA, *overrides]
    config = planned(overrides)
    check_single_run(overrides, config)
    train = known_clips(config).get("train", ())
    plan = make_plan(config, captions=known_captions(config), num_clips=len(train) or None)
    plan = with_changes(plan, overrides, compose_config=planned)
    if as_json:
        print(json.dumps(plan.plain(), indent=2))
    else:
        show_plan(plan, show_all=shows_all)
    # A script can ask by the exit code.
    if not plan.fits:
        raise SystemExit(1)


def _grid(overrides: Sequence[str], output: Path | None, *, as_json: bool) -> None:
    cells = make_grid(grid_names([NO_DATA, *overrides]))
    if as_json:
        print(json.dumps([cell.plain() for cell in cells], indent=2))
    else:
        show_grid(cells)
    if output:
        draw_grid(cells, output)


def _sweep(overrides: Sequence[str], price: float | None, *, as_json: bool) -> None:
    plan = plan_sweep(overrides, price)
    if as_json:
        print(json.dumps(plan.plain(), indent=2, ensure_ascii=False))
    else:
        show_budget(plan)
    if not plan.is_possible:
        raise SystemExit(1)
