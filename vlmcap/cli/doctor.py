"""`vlmcap doctor`: whether this machine is ready, and how far a plan is off on its card."""

from __future__ import annotations

import argparse
from typing import Any

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
    from vlmcap.build.doctor_command import forget, show_doctor, show_measurement

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
