"""`vlmcap check-plugin`: whether a plugin's parts hold what everything else relies on."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from vlmcap.assembly.contracts import Outcome, check_component
from vlmcap.compose import compose
from vlmcap.config.kinds import MAKERS
from vlmcap.config_unread import NO_DATA
from vlmcap.errors import UserError
from vlmcap.plugins import use_plugins
from vlmcap.terminal import wide_console


def run(options: Namespace) -> None:
    """Loads plugins, and prints a table of the contracts of their parts.

    Raises:
        UserError: A plugin cannot be loaded.
        SystemExit: With code 1 where a contract does not hold.
    """
    if not options.plugins:
        raise UserError("vlmcap check-plugin needs a FILE: a Python file or an importable module that registers parts")
    use_plugins(options.plugins)
    own = {Path(name).stem if name.endswith(".py") else name.partition(".")[0] for name in options.plugins}
    parts = [
        (group, kind)
        for group, kinds in MAKERS.items()
        for kind, part in kinds.items()
        if part.__module__.partition(".")[0] in own
    ]
    if idle := [one for one in options.overrides if one.partition(".")[0] not in {group for group, _ in parts}]:
        raise UserError(f"{idle[0]} is no setting of a part that is checked here; leave it out")
    outcomes = [
        outcome
        for group, kind in parts
        for outcome in check_component(group, kind, _settings(group, kind, options.overrides))
    ]
    show(outcomes)
    failed = sum(bool(outcome.problem) for outcome in outcomes)
    print(f"{len(outcomes) - failed} of {len(outcomes)} hold." if failed else f"All {len(outcomes)} hold.")
    if failed:
        raise SystemExit(1)


def _settings(group: str, kind: str, overrides: Sequence[str]) -> Callable[[], Any] | None:
    """Composes the settings of a part where any of them is given."""
    own = [override for override in overrides if override.startswith(f"{group}.")]
    return (
        (lambda: getattr(compose([NO_DATA, "hardware.frame_stack=1", f"{group}={kind}", *own]), group)) if own else None
    )


def show(outcomes: Sequence[Outcome]) -> None:
    """Prints a line for each contract."""
    table = Table("part", "contract", "result", box=None)
    for outcome in outcomes:
        result = f"[bold red]fails[/]: {escape(outcome.problem)}" if outcome.problem else "[green]holds[/]"
        table.add_row(f"{outcome.group}={outcome.kind}", outcome.contract, result)
    wide_console().print(table)
