"""The command `vlmcap`, with a subcommand for each task around training and scoring a captioner.

`arguments.py` declares the arguments of every subcommand and imports nothing heavy. The body of a subcommand is in the
module of its name, which is imported after its arguments have been checked, so that help and errors appear at once.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from importlib import import_module

from vlmcap.cli.arguments import COMMANDS, PROGRAMS, is_override
from vlmcap.errors import StoppedBySignal, UserError, storage_problem
from vlmcap.libraries import import_libraries, set_cuda_variables
from vlmcap.terminal import leave_closed_pipe


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line; a user's mistake ends in one line on stderr and exit code 2."""
    set_cuda_variables()
    given = [*sys.argv[1:]] if arguments is None else [*arguments]
    # Hydra parses the arguments of train and evaluate itself.
    if given[:1] and given[0] in PROGRAMS:
        from vlmcap.program import run_program

        run_program(import_module(f"vlmcap.cli.{given[0]}").main, given[0], given[1:], f"vlmcap {given[0]}")
        return
    options = _parse(given)
    command = next(command for command in COMMANDS if command.name == options.command)
    try:
        command.check(options)
        _read_overrides(options, given)
        if command.traces_models:
            import_libraries(with_adapters=command.name == "plan", with_training=False)
        import_module(f"vlmcap.cli.{command.name.replace('-', '_')}").run(options)
        sys.stdout.flush()
    except UserError as error:
        print(f"Error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except StoppedBySignal as stop:
        print(stop, file=sys.stderr)
        raise SystemExit(stop.exit_code) from None
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:
        leave_closed_pipe()
    # A full disk or a missing permission is no bug of the program, so it ends without a traceback.
    except OSError as error:
        if (sentence := storage_problem(error)) is None:
            raise
        print(f"Error: {sentence}", file=sys.stderr)
        raise SystemExit(2) from None


def _parse(given: Sequence[str]) -> argparse.Namespace:
    """Parses the options, including overrides that follow a flag, which argparse returns as unknown arguments."""
    parser = _parser()
    options, rest = parser.parse_known_args(given)
    if unknown := [argument for argument in rest if not is_override(argument)]:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    options.overrides = [*options.overrides, *rest]
    return options


def _parser() -> argparse.ArgumentParser:
    description = "Korean video captioning: assemble, fine-tune, score and compare."
    parser = argparse.ArgumentParser(prog="vlmcap", description=description)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND", dest="command")
    for name, text in PROGRAMS.items():  # listed here only; Hydra parses their arguments
        commands.add_parser(name, help=text)
    for command in COMMANDS:
        text = f"{command.help[0].upper()}{command.help[1:]}."
        command.add_arguments(commands.add_parser(command.name, help=command.help, description=text))
    return parser


def _read_overrides(options: argparse.Namespace, given: Sequence[str]) -> None:
    """Loads the user's plugins and configuration folder, and rewrites the overrides in Hydra's grammar.

    Raises:
        UserError: An override is malformed, a plugin cannot be loaded, or the folder does not exist.
    """
    if options.plugin:
        from vlmcap.plugins import use_plugins

        use_plugins(options.plugin)
    if options.config_dir:
        from vlmcap.config_files import use_config_dir

        use_config_dir(options.config_dir)
    if options.overrides:
        from vlmcap.overrides import read_overrides

        is_sweep = options.command in ("spectrum", "dashboard") or any(
            getattr(options, name, False) for name in ("multirun", "grid")
        )
        command = shlex.join(["vlmcap", "plan", "-m", *given[1:]]) if options.command == "plan" else ""
        options.overrides = read_overrides(options.overrides, is_sweep=is_sweep, command=command)
