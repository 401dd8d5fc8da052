"""The end of a sweep: a line for each job, and what to type next."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from vlmcap.sweeping.runner import Done
from vlmcap.sweeping.status import FINISHED


def show_sweep(done: Sequence[Done], folder: Path, objective: tuple[str, str], *, is_interrupted: bool = False) -> None:
    """Prints every job with its status, objective and time, the best one, and the commands that go on from here.

    Args:
        done: In any order; of a folder that is there twice the last counts.
        folder: Of the sweep.
        objective: Its name, and `max` or `min`.
        is_interrupted: Whether jobs are left.
    """
    from rich.console import Console
    from rich.table import Table

    rows = sorted({one.number: one for one in done}.values(), key=lambda one: one.number)
    best = best_of(rows, objective[1])
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("job", "what differs", "status", objective[0], "min", "reason"):
        table.add_column(name, justify="right" if name in ("job", objective[0], "min") else "left", overflow="fold")
    for one in rows:
        status = one.status
        value = "" if status.objective is None else f"{status.objective:.4f}"
        word = status.status if one.is_new else f"{status.status} before"
        reason = status.reason + _plan(one)
        style = "bold" if one is best else "red" if one.is_failure else None
        table.add_row(str(one.number), one.job.name, word, value, f"{status.seconds / 60:.1f}", reason, style=style)
    Console(width=None if os.isatty(1) else 160, soft_wrap=False).print(table)
    if best is not None:
        print(f"Best {objective[0]}: {best.status.objective:.4f}, job {best.number}, {best.job.name}")
    failures = sum(one.is_failure for one in rows)
    if failures:
        print(f"{failures} of {len(rows)} came to nothing; status.json in their folders says why.")
    shown = shlex.quote(_shown(folder))
    if is_interrupted or failures:
        print(f"To go on, or try again what came to nothing: the same command with sweep.resume=true sweep.folder={shown}")
    print(f"To compare them: vlmcap report {shown}", flush=True)


def best_of(done: Sequence[Done], mode: str) -> Done | None:
    """The finished job with the best objective."""
    sign = -1.0 if mode == "min" else 1.0
    scored = [(sign * one.status.objective, one) for one in done if one.status.status == FINISHED and one.status.objective is not None]
    return max(scored, key=lambda pair: pair[0])[1] if scored else None


def _plan(one: Done) -> str:
    plan = one.status.plan
    if not plan or "GiB" in one.status.reason:
        return ""
    return f" (planned {plan['peak_gib']:.1f} GiB of {plan['usable_gib']:.1f})"


def _shown(folder: Path) -> str:
    return str(folder.relative_to(Path.cwd())) if folder.is_relative_to(Path.cwd()) else str(folder)
