"""The command `vlmcap`: what is done with models and data besides training.

A command has its arguments in `arguments.py`, which imports nothing heavy, and its body in the module of its name, which is imported
once the arguments are known to be right: help and mistakes in arguments come at once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from vlmcap.cli.arguments import COMMANDS
from vlmcap.errors import StoppedBySignal, UserError
from vlmcap.libraries import import_libraries


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point; a user's mistake is one line on stderr and exit code 2."""
    description = "Korean video captioning: assemble, fine-tune, score and compare."
    parser = argparse.ArgumentParser(prog="vlmcap", description=description)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND", dest="command")
    for command in COMMANDS:
        text = f"{command.help[0].upper()}{command.help[1:]}."
        command.add_arguments(commands.add_parser(command.name, help=command.help, description=text))
    options = parser.parse_args(arguments)
    command = next(command for command in COMMANDS if command.name == options.command)
    try:
        command.check(options)
        if command.traces_models:
            import_libraries(with_adapters=command.name == "plan", with_training=False)
        import_module(f"vlmcap.cli.{command.name}").run(options)
    except UserError as error:
        print(f"Error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except StoppedBySignal as stop:
        print(stop, file=sys.stderr)
        raise SystemExit(stop.exit_code) from None
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        raise SystemExit(130) from None
