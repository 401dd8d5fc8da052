"""`vlmcap check-plugin`: checks that a plugin's components satisfy the contracts of the package."""

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
    """Loads plugins, checks their components, and prints a table of the contracts.

    Raises:
        UserError: A plugin cannot be loaded, or an override does not set a key of its components.
        SystemExit: With code 1 if a check fails.
    """
    if not options.plugins:
        raise UserError(
            "vlmcap check-plugin needs a FILE: a Python file or an importable module that registers components"
        )
    use_plugins(options.plugins)
    # "my_projector.py" -> "my_projector", "package.module" -> "package"
    modules = {Path(name).stem if name.endswith(".py") else name.partition(".")[0] for name in options.plugins}
    components = [
        (group, kind)
        for group, kinds in MAKERS.items()
        for kind, maker in kinds.items()
        # Components of the package itself and of installed plugins are not checked.
        if maker.__module__.partition(".")[0] in modules
    ]
    groups = {group for group, _ in components}
    if unused := [override for override in options.overrides if override.partition(".")[0] not in groups]:
        raise UserError(f"{unused[0]} is not a setting of a component of this plugin; remove it")
    outcomes = [
        outcome
        for group, kind in components
        for outcome in check_component(group, kind, _settings(group, kind, options.overrides))
    ]
    show(outcomes)
    failed = sum(bool(outcome.problem) for outcome in outcomes)
    print(f"{failed} of {len(outcomes)} checks failed." if failed else f"All {len(outcomes)} checks passed.")
    if failed:
        raise SystemExit(1)


def _settings(group: str, kind: str, overrides: Sequence[str]) -> Callable[[], Any] | None:
    """Returns a function that composes a component's settings, or None if no override sets any of them."""
    given = [override for override in overrides if override.startswith(f"{group}.")]
    if not given:
        return None
    # A component needs a complete configuration to be composed, but no data set.
    return lambda: getattr(compose([NO_DATA, "hardware.frame_stack=1", f"{group}={kind}", *given]), group)


def show(outcomes: Sequence[Outcome]) -> None:
    """Prints a line for each contract."""
    table = Table("component", "contract", "result", box=None)
    for outcome in outcomes:
        result = f"[bold red]failed[/]: {escape(outcome.problem)}" if outcome.problem else "[green]passed[/]"
        table.add_row(f"{outcome.group}={outcome.kind}", outcome.contract, result)
    wide_console().print(table)
