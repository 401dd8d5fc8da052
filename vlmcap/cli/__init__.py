"""`vlmcap`: what is done with models and data beside training. A command is a module here and a word in `COMMANDS`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from vlmcap.cli import cache, caption, dashboard, data, doctor, export, plan, report, spectrum
from vlmcap.errors import StoppedBySignal, UserError

COMMANDS = (doctor, plan, cache, caption, data, export, report, spectrum, dashboard)
"""Modules with `add(commands)`, which adds a parser whose `run` takes the options; whatever is slow to import they import when run."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point; a user's mistake is one line on stderr and exit code 2."""
    parser = argparse.ArgumentParser(prog="vlmcap", description="Korean video captioning: assemble, fine-tune, score and compare.")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add(commands)
    options = parser.parse_args(arguments)
    try:
        options.run(options)
    except UserError as error:
        print(f"Error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except StoppedBySignal as stop:
        print(stop, file=sys.stderr)
        raise SystemExit(stop.exit_code) from None
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        raise SystemExit(130) from None
