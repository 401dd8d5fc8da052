"""What `vlmcap doctor` found, for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from vlmcap.measuring.measured import Comparison
from vlmcap.terminal import duration

Level = Literal["ok", "warning", "problem"]
_STYLES = {"ok": "green", "warning": "yellow", "problem": "bold red"}
_CLOSE = 0.02  # of a planned figure: what is called as planned


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that a run needs or is glad of.

    Attributes:
        name: Of it.
        level: "ok"; "warning" where runs work without; "problem" where they do not.
        found: What is there.
        mend: What to do; empty where nothing is to be done.
    """

    name: str
    level: Level
    found: str
    mend: str = ""

    def plain(self) -> dict[str, Any]:
        """As JSON takes it."""
        return asdict(self)


def verdict(checks: Sequence[Check]) -> str:
    """Whether the machine is ready."""
    names = {level: [check.name for check in checks if check.level == level] for level in _STYLES}
    if names["problem"]:
        return f"Not ready: {', '.join(names['problem'])}."
    if names["warning"]:
        return f"Ready, with {len(names['warning'])} warning{'s' if len(names['warning']) > 1 else ''}: {', '.join(names['warning'])}."
    return "Ready."


def show_checks(checks: Sequence[Check]) -> None:
    """Prints a line each, its mend below it, and the verdict last."""
    console = Console(highlight=False)
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column()
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for check in checks:
        text = check.found if not check.mend else f"{check.found}: {check.mend}"
        table.add_row(f"[{_STYLES[check.level]}]{check.level}[/]", check.name, text.replace("[", "\\["))
    console.print(table)
    worst: Level = next((level for level in ("problem", "warning") if any(check.level == level for check in checks)), "ok")
    console.print(verdict(checks), style=_STYLES[worst], markup=False, soft_wrap=True)


def show_comparison(comparison: Comparison) -> None:
    """Prints plan and measurement side by side, whether it is kept, and how far off the plan is last."""
    console = Console(highlight=False)
    plan, measured, ratios = comparison.plan, comparison.measured, comparison.ratios
    cut = "" if comparison.num_blocks is None else f", {comparison.num_blocks} block{'s' if comparison.num_blocks > 1 else ''}"
    table = Table(title=f"{plan.title}{cut}, hardware={plan.hardware}, on {comparison.card}", title_justify="left", title_style="bold")
    for column in ("", "plan", "measured", "ratio"):
        table.add_column(column, justify="left" if not column else "right")
    memory = {"training": (plan.training_gib, comparison.training_gib), "generation": (plan.generation_gib, comparison.generation_gib)}
    for name, (planned, found) in memory.items():
        table.add_row(f"memory in {name}", f"{planned:.2f} GiB", f"{found:.2f} GiB", f"{ratios[f'{name}_gib']:.2f}")
    for name, use in (("training", measured.training), ("generation", measured.generation)):
        table.add_row(f"  of it by tensors, {name}", "", f"{use.allocated:.2f} GiB", "")
    table.add_row("  of it beside PyTorch", f"{plan.card.context_gib:.2f} GiB", f"{measured.context_gib:.2f} GiB", "")
    rows = {"clip": (f"a clip, batch {plan.batch_size}", plan.clip_s, measured.clip_s)}
    rows["token"] = (f"a caption token, batch {plan.eval_batch_size}", plan.token_s, measured.token_s)
    for name, (label, planned, found) in rows.items():
        table.add_row(label, duration(planned), duration(found), f"{ratios[f'seconds_per_{name}']:.2f}")
    console.print(table)
    if comparison.why_not_kept:
        console.print(f"Not kept for later plans: {comparison.why_not_kept}.", markup=False, soft_wrap=True)
    else:
        console.print(
            "Kept: `vlmcap plan` uses these figures for this card; `vlmcap doctor --forget` removes them.", markup=False, soft_wrap=True
        )
    console.print(distance(comparison), style="bold", markup=False, soft_wrap=True)


def distance(comparison: Comparison) -> str:
    """How far off the plan is, in one sentence."""
    ratios = comparison.ratios
    memory = " and ".join(f"{_off(ratios[f'{name}_gib'])} in {name}" for name in ("training", "generation"))
    seconds = [
        f"{'a clip' if name == 'clip' else 'a token'} takes {_times(ratios[f'seconds_per_{name}'])} times" for name in ("clip", "token")
    ]
    return f"The plan's memory is {memory}; {' and '.join(seconds)} the planned seconds."


def _times(ratio: float) -> str:
    return f"{ratio:.0f}" if ratio >= 10 else f"{ratio:.1f}" if ratio >= 1 else f"{ratio:.2f}"


def _off(ratio: float) -> str:
    if abs(ratio - 1) <= _CLOSE:
        return "right"
    return f"{abs(1 / ratio - 1):.0%} too {'low' if ratio > 1 else 'high'}"
