"""What a sweep takes, in numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from vlmcap.planning.sweep_budget.budget import HOUR_S, Encoding, Job, encodings, sweep_seconds
from vlmcap.planning.sweep_budget.proposals import Proposal


@dataclass(frozen=True, slots=True)
class SweepPlan:
    """Combinations, their sum, and what brings it under the budget.

    Attributes:
        jobs: The combinations.
        price: Of an hour; None where none was given.
        budget_h: Hours for all; None is no limit.
        proposals: Changes where the budget is exceeded.
        notes: What was counted, and how far it may be trusted.
    """

    jobs: Sequence[Job]
    price: float | None = None
    budget_h: float | None = None
    proposals: Sequence[Proposal] = ()
    notes: Sequence[str] = field(default=())

    @property
    def training_h(self) -> float:
        """Of all combinations."""
        return sum(job.training_s for job in self.jobs) / HOUR_S

    @property
    def evaluation_h(self) -> float:
        """Of all combinations."""
        return sum(job.evaluation_s for job in self.jobs) / HOUR_S

    @property
    def encodings(self) -> list[Encoding]:
        """Features that are made once."""
        return encodings(self.jobs)

    @property
    def total_h(self) -> float:
        """With the shared encoding."""
        return sweep_seconds(self.jobs) / HOUR_S

    @property
    def fitting(self) -> list[Job]:
        """Combinations that can run."""
        return [job for job in self.jobs if job.fits]

    @property
    def is_within(self) -> bool:
        """Whether the sweep keeps to its budget as it is."""
        return self.budget_h is None or self.total_h <= self.budget_h

    @property
    def proposed_h(self) -> float:
        """With all proposals; without any, as it is."""
        return self.proposals[-1].total_s / HOUR_S if self.proposals else self.total_h

    @property
    def is_possible(self) -> bool:
        """Whether something can run, and within the budget, be it with the proposals."""
        return bool(self.fitting) and (self.budget_h is None or self.proposed_h <= self.budget_h)

    def plain(self) -> dict[str, Any]:
        """As `--json` prints it; hours, GiB and seconds as the names say."""
        return {
            "combinations": [_plain_job(job) for job in self.jobs],
            "encoding": [
                {"encoder": one.encoder, "num_clips": one.num_clips, "num_readers": one.num_readers, "hours": _hours(one.seconds)}
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
                {"override": one.override, "cost": one.cost, "total_h": _hours(one.total_s), "num_fitting": one.num_fitting}
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
