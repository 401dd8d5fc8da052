"""`vlmcap doctor`: whether this machine is ready, and how far a plan is off on its card."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

from vlmcap.compose import compose
from vlmcap.errors import UserError


def add(commands: Any) -> None:
    """Adds the command to the parsers of argparse."""
    text = "whether this machine is ready; with --measure, how far a plan is off on its card"
    parser = commands.add_parser("doctor", help=text, description=text[0].upper() + text[1:] + "; exit code 1 on a problem.")
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="as of train.py, such as encoder=siglip2 llm=qwen3_8b hardware=l4"
    )
    parser.add_argument(
        "--measure", action="store_true", help="take three training steps and write short captions at true size with random weights"
    )
    parser.add_argument("--blocks", type=int, metavar="N", help="measure with N blocks of encoder and language model, and of the plan's")
    parser.add_argument("--forget", action="store_true", help="remove the measurements that plans of cards use")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:

    if options.forget and (options.measure or options.json):
        raise UserError("--forget goes with no other flag; run it alone, and --measure behind it")
    if options.blocks is not None and not options.measure:
        raise UserError("--blocks cuts what is measured; add --measure")
    if options.blocks is not None and options.blocks < 1:
        raise UserError(f"--blocks must be at least 1, not {options.blocks}")
    if options.forget:
        forget(options.overrides)
    elif options.measure:
        show_measurement(options.overrides, options.blocks, as_json=options.json)
    else:
        show_doctor(options.overrides, as_json=options.json)


_NO_DATA = "data.root=unset"  # the doctor needs no clips


def show_doctor(overrides: Sequence[str], *, as_json: bool = False) -> None:
    """Prints what was found, and exits with 1 where something keeps runs from working.

    Args:
        overrides: As `train.py` takes them: the hardware that is meant, and paths.
        as_json: As JSON.

    Raises:
        UserError: Something in the configuration does not do.
    """
    from vlmcap.cli.doctor_checks import run_checks
    from vlmcap.cli.doctor_table import show_checks, verdict

    checks = run_checks(compose([_NO_DATA, *overrides]))
    is_ready = not any(check.level == "problem" for check in checks)
    if as_json:
        plain = {"ready": is_ready, "verdict": verdict(checks), "checks": [check.plain() for check in checks]}
        print(json.dumps(plain, ensure_ascii=False, indent=2))
    else:
        show_checks(checks)
    if not is_ready:
        raise SystemExit(1)


def show_measurement(overrides: Sequence[str], num_blocks: int | None, *, as_json: bool = False) -> None:
    """Prints a plan beside what this machine did.

    Args:
        overrides: As `train.py` takes them; data.root is not needed.
        num_blocks: Of encoder and language model; None takes all.
        as_json: As JSON.
    """
    from vlmcap.measuring.measure import measure

    comparison = measure(overrides, num_blocks)
    if as_json:
        print(json.dumps(comparison.plain(), ensure_ascii=False, indent=2))
        return
    from vlmcap.cli.doctor_table import show_comparison

    show_comparison(comparison)


def forget(overrides: Sequence[str]) -> None:
    """Removes the measurements that are kept under paths.cache_dir."""
    from vlmcap.planning.calibration import calibration_files
    from vlmcap.planning.device import calibration_folder

    folder = calibration_folder(compose([_NO_DATA, *overrides]))
    files = calibration_files(folder)
    for file in files:
        file.unlink(missing_ok=True)
        print(f"Removed {file.name}.")
    if not files:
        print(f"Nothing is kept in {folder}.")
