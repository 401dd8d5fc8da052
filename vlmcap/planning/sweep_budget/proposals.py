"""What brings a sweep under its budget, in order of lost quality."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from vlmcap.planning.sweep_budget.budget import Job, largest_subset, num_fitting, sweep_seconds, with_clips

_LEAST_GAIN = 0.01  # of the seconds, that a change must save to be proposed


@dataclass(frozen=True, slots=True)
class Proposal:
    """A change that saves hours.

    Attributes:
        override: As `train.py` takes it.
        cost: What is lost by it, for people.
        total_s: Of the sweep with it, and with those in front of it in the list.
        num_fitting: Combinations that fit their card with it; more than before count with their hours.
        keeps_quality: The scores stay as they are.
    """

    override: str
    cost: str
    total_s: float
    num_fitting: int
    keeps_quality: bool = False


# In order of lost quality; a subset of the clips comes behind them.
_STEPS: tuple[tuple[str, str, bool], ...] = (
    ("cache.enabled=true", "no quality: disk for the features", True),
    ("evaluation.max_clips=32", "a coarser choice of the best checkpoint", False),
    ("projector.reducer=pool", "a quarter of the visual tokens, 2 × 2 averaged", False),
    ("data.num_frames=4", "fewer frames", False),
)
Replan = Callable[[Sequence[str]], Sequence[Job] | None]


def propose(jobs: Sequence[Job], budget_s: float, replan: Replan) -> list[Proposal]:
    """The changes, least loss first, that bring a sweep under its budget or as near as they can; each on top of those before it.

    Args:
        jobs: As they are now.
        budget_s: Seconds that all may take.
        replan: The combinations with more overrides; None where these do not go with them. Others may fit the card then, and count.
    """
    chosen: list[Proposal] = []
    best = jobs
    for override, cost, keeps_quality in _STEPS:
        if sweep_seconds(best) <= budget_s:
            break
        changed = replan([*(proposal.override for proposal in chosen), override])
        if changed is not None and _saves(best, changed):
            best = changed
            chosen.append(Proposal(override, cost, sweep_seconds(best), num_fitting(best), keeps_quality))
    if sweep_seconds(best) <= budget_s:
        return _needed(chosen, budget_s, replan)
    max_clips = largest_subset(best, budget_s)
    if max_clips is not None:
        most = max(job.clips.train for job in best)
        cost = f"{max_clips / most:.0%} of the training clips, the first of the seeded order"
        chosen.append(Proposal(f"data.max_clips={max_clips}", cost, sweep_seconds(with_clips(best, max_clips)), num_fitting(best)))
    return chosen


def _saves(before: Sequence[Job], after: Sequence[Job]) -> bool:
    """Whether those that fitted still fit, and take less; what fits only now is no reason against a change."""
    pairs = [(old, new) for old, new in zip(before, after, strict=True) if old.fits]
    if not all(new.fits for _, new in pairs):
        return False
    old_s, new_s = sweep_seconds([old for old, _ in pairs]), sweep_seconds([new for _, new in pairs])
    return new_s < (1 - _LEAST_GAIN) * old_s


def _needed(chosen: Sequence[Proposal], budget_s: float, replan: Replan) -> list[Proposal]:
    """The changes without those that cost quality and that the budget holds without."""
    kept = list(chosen)
    for proposal in reversed(chosen[:-1]):
        rest = [other for other in kept if other is not proposal]
        jobs = None if proposal.keeps_quality else replan([other.override for other in rest])
        if jobs is not None and sweep_seconds(jobs) <= budget_s:
            kept = rest
    result = []
    for index, proposal in enumerate(kept):
        jobs = replan([other.override for other in kept[: index + 1]])
        result.append(proposal if jobs is None else replace(proposal, total_s=sweep_seconds(jobs), num_fitting=num_fitting(jobs)))
    return result
