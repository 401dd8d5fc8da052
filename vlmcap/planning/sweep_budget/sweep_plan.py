"""The hours of a sweep, printed as JSON or on the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table

from vlmcap.planning.sweep_budget.budget import HOUR_S, Encoding, Job, Proposal, encodings, sweep_seconds
from vlmcap.terminal import grouped, short_number

_WIDEST = 90  # columns, so that rows stay readable on a wide terminal


@dataclass(frozen=True, slots=True)
class SweepPlan:
    """The combinations of a sweep, their sum, and proposals to bring it under the budget.

    Attributes:
        jobs: The combinations.
        price: Price per hour; None if not given.
        budget_h: Hours for the whole sweep; None for no limit.
        proposals: Proposed changes where the budget is exceeded.
        notes: What was counted, and how accurate it is.
    """

    jobs: Sequence[Job]
    price: float | None = None
    budget_h: float | None = None
    proposals: Sequence[Proposal] = ()
    notes: Sequence[str] = field(default=())

    @property
    def training_h(self) -> float:
        """Training hours of all combinations."""
        return sum(job.training_s for job in self.jobs) / HOUR_S

    @property
    def evaluation_h(self) -> float:
        """Evaluation hours of all combinations."""
        return sum(job.evaluation_s for job in self.jobs) / HOUR_S

    @property
    def encodings(self) -> list[Encoding]:
        """Features that are encoded once."""
        return encodings(self.jobs)

    @property
    def total_h(self) -> float:
        """Hours of the whole sweep, including shared encoding."""
        return sweep_seconds(self.jobs) / HOUR_S

    @property
    def fitting(self) -> list[Job]:
        """Combinations that can run."""
        return [job for job in self.jobs if job.fits]

    @property
    def is_within(self) -> bool:
        """Whether the sweep is within its budget without changes."""
        return self.budget_h is None or self.total_h <= self.budget_h

    @property
    def proposed_h(self) -> float:
        """Hours with all proposals; without any, those of the sweep."""
        return self.proposals[-1].total_s / HOUR_S if self.proposals else self.total_h

    @property
    def is_possible(self) -> bool:
        """Whether a combination can run, and the sweep is within its budget with the proposals."""
        return bool(self.fitting) and (self.budget_h is None or self.proposed_h <= self.budget_h)

    def plain(self) -> dict[str, Any]:
        """Returns what `--json` prints; names give the units."""
        return {
            "combinations": [_plain_job(job) for job in self.jobs],
            "encoding": [
                {
                    "encoder": one.encoder,
                    "num_clips": one.num_clips,
                    "num_readers": one.num_readers,
                    "hours": _hours(one.seconds),
                }
                for one in self.encodings
            ],
            "training_h": round(self.training_h, 3),
            "evaluation_h": round(self.evaluation_h, 3),
            "encoding_h": _hours(sum(one.seconds for one in self.encodings)),
            "total_h": round(self.total_h, 3),
            "price_per_h": self.price,
            "price": None if self.price is None else round(self.price * self.total_h, 2),
            "budget_h": self.budget_h,
            "is_within_budget": self.is_within,
            "is_possible": self.is_possible,
            "proposals": [
                {
                    "override": one.override,
                    "cost": one.cost,
                    "total_h": _hours(one.total_s),
                    "num_fitting": one.num_fitting,
                }
                for one in self.proposals
            ],
            "add": [proposal.override for proposal in self.proposals],
            "proposed_h": round(self.proposed_h, 3),
            "notes": list(self.notes),
        }


def _plain_job(job: Job) -> dict[str, Any]:
    return {
        "name": job.name,
        "overrides": list(job.overrides),
        "hardware": job.hardware,
        "fits": job.fits,
        "refusal": job.refusal or None,
        "peak_gib": round(job.peak_gib, 3),
        "usable_gib": job.usable_gib,
        "num_train": job.clips.train,
        "num_val": job.clips.val,
        "num_test": job.clips.test,
        "num_epochs": job.num_epochs,
        "clips_trained": job.num_trained,
        "clips_captioned_in_loop": job.num_in_loop,
        "seconds_per_clip": round(job.seconds.train, 4),
        "seconds_per_caption": round(job.seconds.caption, 4),
        "seconds_per_encoding": round(job.seconds.encode, 4),
        "training_h": _hours(job.training_s),
        "evaluation_h": _hours(job.evaluation_s),
        "total_h": _hours(job.total_s),
    }


def _hours(seconds: float) -> float:
    return round(seconds / HOUR_S, 3)


def show_budget(plan: SweepPlan) -> None:
    """Prints a row per combination, the sums, the proposals, the line to add, and the verdict last."""
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
            console.print(
                f"Add: {' '.join(proposal.override for proposal in plan.proposals)}", markup=False, soft_wrap=True
            )
    console.print(
        verdict(plan), style="bold green" if plan.is_possible and plan.is_within else "bold red", markup=False
    )


def _table(plan: SweepPlan) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("combination", overflow="fold")
    table.add_column("GiB", justify="right", no_wrap=True)
    table.add_column("fits", no_wrap=True)
    for name in ("training h", "evaluation h", "total h"):
        table.add_column(name, justify="right", no_wrap=True)
    for job in plan.jobs:
        table.add_row(*_row(job))
    # Encoding is shared, so it is in no row of a combination.
    for encoding in plan.encodings:
        what = f"features of {encoding.encoder}, once for {encoding.num_readers}"
        table.add_row(what, "", "", "", "", short_number(encoding.seconds / HOUR_S), style="dim")
    sums = (plan.training_h, plan.evaluation_h, plan.total_h)
    table.add_row(f"sum of {len(plan.fitting)}", "", "", *(short_number(hours) for hours in sums), style="bold")
    return table


def _row(job: Job) -> tuple[str, ...]:
    if job.refusal:
        return (job.name, "–", "no", "–", "–", "–")
    peak = f"{job.peak_gib:.1f}"
    if not job.fits:
        return (job.name, peak, "no", "–", "–", "–")
    return (
        job.name,
        peak,
        "yes",
        *(short_number(seconds / HOUR_S) for seconds in (job.training_s, job.evaluation_s, job.total_s)),
    )


def _proposals(plan: SweepPlan) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(overflow="fold")
    for proposal in plan.proposals:
        more = f"; {proposal.num_fitting} combinations fit then" if proposal.num_fitting != len(plan.fitting) else ""
        table.add_row(proposal.override, f"{short_number(proposal.total_s / HOUR_S)} h", proposal.cost + more)
    return table


def verdict(plan: SweepPlan) -> str:
    """Returns one sentence: whether the sweep can run, how long it takes, and its price."""
    count, num_fitting = len(plan.jobs), len(plan.fitting)
    if not num_fitting:
        return (
            f"None of {count} combinations fits; run `vlmcap plan` with the overrides of one to see what makes it fit."
        )
    hours = f"{short_number(plan.total_h)} h" + (
        f", {_money(plan.price * plan.total_h)} at {plan.price:g} per hour" if plan.price is not None else ""
    )
    what = f"{num_fitting} of {count} combinations: {hours}"
    if plan.budget_h is None:
        return f"{what}."
    if plan.is_within:
        return f"{what}; within the budget of {plan.budget_h:g} h."
    over = f"{what}; over the budget of {plan.budget_h:g} h"
    if plan.is_possible:
        money = f" ({_money(plan.price * plan.proposed_h)})" if plan.price is not None else ""
        return f"{over}, and {short_number(plan.proposed_h)} h{money} with the line above."
    what = "the changes above with data.max_clips=100" if plan.proposals else "data.max_clips=100"
    return f"{over}, and {what} would not be enough; sweep fewer combinations or raise sweep.budget_h."


def _money(amount: float) -> str:
    return grouped(round(amount)) if amount >= 100 else f"{amount:.2f}"
