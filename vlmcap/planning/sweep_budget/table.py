"""Hours of a sweep for the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from vlmcap.planning.sweep_budget.budget import HOUR_S, Job
from vlmcap.planning.sweep_budget.result import SweepPlan
from vlmcap.terminal import grouped

_WIDEST = 90  # columns: a wide terminal does not tear a row apart


def show_budget(plan: SweepPlan) -> None:
    """Prints a row a combination, the sums, the proposals, the line to add, and the verdict last."""
    console = Console(highlight=False)
    console.print(_table(plan), width=min(console.width, _WIDEST))
    for job in plan.jobs:
        if not job.fits:
            why = job.refusal or f"needs {job.peak_gib:.1f} GiB, and hardware={job.hardware} has {job.usable_gib:.1f}"
            console.print(f"Left out: {job.name}: {why}", markup=False)
    for note in plan.notes:
        console.print(note, markup=False)
    if plan.proposals:
        console.print("In order of lost quality, each with those above it:", markup=False)
        console.print(_proposals(plan), width=min(console.width, _WIDEST))
        if plan.is_possible:
            console.print(f"Add: {' '.join(proposal.override for proposal in plan.proposals)}", markup=False, soft_wrap=True)
    console.print(verdict(plan), style="bold green" if plan.is_possible and plan.is_within else "bold red", markup=False)


def _table(plan: SweepPlan) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("combination", overflow="fold")
    table.add_column("GiB", justify="right", no_wrap=True)
    table.add_column("fits", no_wrap=True)
    for name in ("training h", "evaluation h", "total h"):
        table.add_column(name, justify="right", no_wrap=True)
    for job in plan.jobs:
        table.add_row(*_row(job))
    for encoding in plan.encodings:
        what = f"features of {encoding.encoder}, once for {encoding.num_readers}"
        table.add_row(what, "", "", "", "", _shown(encoding.seconds / HOUR_S), style="dim")
    sums = (plan.training_h, plan.evaluation_h, plan.total_h)
    table.add_row(f"sum of {len(plan.fitting)}", "", "", *(_shown(hours) for hours in sums), style="bold")
    return table


def _row(job: Job) -> tuple[str, ...]:
    if job.refusal:
        return (job.name, "–", "no", "–", "–", "–")
    peak = f"{job.peak_gib:.1f}"
    if not job.fits:
        return (job.name, peak, "no", "–", "–", "–")
    return (job.name, peak, "yes", *(_shown(seconds / HOUR_S) for seconds in (job.training_s, job.evaluation_s, job.total_s)))


def _proposals(plan: SweepPlan) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(overflow="fold")
    for proposal in plan.proposals:
        more = f"; {proposal.num_fitting} combinations fit then" if proposal.num_fitting != len(plan.fitting) else ""
        table.add_row(proposal.override, f"{_shown(proposal.total_s / HOUR_S)} h", proposal.cost + more)
    return table


def verdict(plan: SweepPlan) -> str:
    """One sentence: whether the sweep runs, how long, and for how much."""
    count, num_fitting = len(plan.jobs), len(plan.fitting)
    if not num_fitting:
        return f"None of {count} combinations fits; `vlmcap plan` with the overrides of one says what makes it fit."
    hours = f"{_shown(plan.total_h)} h" + (
        f", {_money(plan.price * plan.total_h)} at {plan.price:g} an hour" if plan.price is not None else ""
    )
    what = f"{num_fitting} of {count} combinations: {hours}"
    if plan.budget_h is None:
        return f"{what}."
    if plan.is_within:
        return f"{what}; within the budget of {plan.budget_h:g} h."
    over = f"{what}; over the budget of {plan.budget_h:g} h"
    if plan.is_possible:
        money = f" ({_money(plan.price * plan.proposed_h)})" if plan.price is not None else ""
        return f"{over}, and {_shown(plan.proposed_h)} h{money} with the line above."
    what = "the changes above with data.max_clips=100" if plan.proposals else "data.max_clips=100"
    return f"{over}, and not even {what} would do: take fewer combinations or more hours."


def _money(amount: float) -> str:
    return grouped(round(amount)) if amount >= 100 else f"{amount:.2f}"


def _shown(hours: float) -> str:
    """`93.4`, `1 204`, `0.31` or `0.002`."""
    if hours >= 1000:
        return grouped(round(hours))
    return f"{hours:.1f}" if hours >= 10 else f"{hours:.2f}" if hours >= 0.1 or hours == 0 else f"{hours:.2g}"
