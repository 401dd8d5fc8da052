"""Hours of a sweep: those of each combination, those of all together, and ways to bring them under a budget.

Counted are the clips that a run takes (every epoch of every stage, the evaluations in the loop, whole splits at the
end) times the seconds that its GPU needs for one. Features that are kept are encoded once, however many combinations
read them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

HOUR_S = 3600.0
SUBSET_STEP = 100  # clips: a proposed subset is a round number
_LEAST_GAIN = 0.01  # of the seconds, that a change must save to be proposed
# In order of lost quality; a subset of the clips comes behind them.
_STEPS: tuple[tuple[str, str, bool], ...] = (
    ("cache.enabled=true", "no quality: disk for the features", True),
    ("evaluation.max_clips=32", "a coarser choice of the best checkpoint", False),
    ("projector.reducer=pool", "a quarter of the visual tokens, 2 × 2 averaged", False),
    ("data.num_frames=4", "fewer frames", False),
)


@dataclass(frozen=True, slots=True)
class ClipSeconds:
    """Seconds of the GPU for one clip.

    Attributes:
        train: A training step's, with the encoder unless its features are stored.
        caption: To write its caption from its features.
        loss: The pass for its validation loss, from its features.
        encode: The encoder alone.
    """

    train: float
    caption: float
    loss: float
    encode: float


@dataclass(frozen=True, slots=True)
class NumClips:
    """Clips of each split."""

    train: int
    val: int
    test: int

    @property
    def total(self) -> int:
        """Of all splits."""
        return self.train + self.val + self.test


@dataclass(frozen=True, slots=True)
class Job:
    """One combination of a sweep.

    Attributes:
        name: What tells it from the others.
        overrides: Of its run.
        hardware: Name of its GPU.
        peak_gib: Of memory.
        usable_gib: That the GPU has.
        seconds: Of one clip.
        clips: That it has.
        num_epochs: Of all stages.
        every_n_epochs: Epochs from one evaluation to the next.
        max_eval_clips: Of the validation split, captioned in the loop.
        max_trained: Clips that trainer.max_steps allows in all; None is no limit.
        store: Of the features that it reads, equal for combinations that share them; None encodes anew each time.
        refusal: Why its parts do not go together; empty where they do.
    """

    name: str
    overrides: tuple[str, ...]
    hardware: str
    peak_gib: float
    usable_gib: float
    seconds: ClipSeconds
    clips: NumClips
    num_epochs: int
    every_n_epochs: int
    max_eval_clips: int
    max_trained: int | None = None
    store: str | None = None
    refusal: str = ""

    @property
    def fits(self) -> bool:
        """Whether it can run; what cannot takes no time."""
        return not self.refusal and self.peak_gib <= self.usable_gib

    @property
    def num_trained(self) -> int:
        """Clips taken in training, epochs and all."""
        whole = self.num_epochs * self.clips.train
        return whole if self.max_trained is None else min(whole, self.max_trained)

    @property
    def num_in_loop(self) -> int:
        """Clips captioned while training, all evaluations together."""
        num_epochs = math.ceil(self.num_trained / self.clips.train)
        return num_epochs // self.every_n_epochs * min(self.max_eval_clips, self.clips.val)

    @property
    def training_s(self) -> float:
        """Seconds of all training steps."""
        return self.num_trained * self.seconds.train if self.fits else 0.0

    @property
    def evaluation_s(self) -> float:
        """Seconds of captions and validation loss in the loop, and of captions of the whole other splits at the end."""
        if not self.fits:
            return 0.0
        encode_s = self.seconds.encode if self.store is None else 0.0
        in_loop_s = self.seconds.caption + self.seconds.loss + 2 * encode_s
        return self.num_in_loop * in_loop_s + (self.clips.val + self.clips.test) * (self.seconds.caption + encode_s)

    @property
    def total_s(self) -> float:
        """Both."""
        return self.training_s + self.evaluation_s


@dataclass(frozen=True, slots=True)
class Encoding:
    """The making of stored features, once for all who read them.

    Attributes:
        store: Of the features.
        num_clips: Of all splits.
        seconds: Of the encoder.
        num_readers: Combinations that read them.
    """

    store: str
    num_clips: int
    seconds: float
    num_readers: int

    @property
    def encoder(self) -> str:
        """Its name, with which the store's begins."""
        return self.store.partition(" ")[0]


def encodings(jobs: Sequence[Job]) -> list[Encoding]:
    """What is encoded once, in order of the first reader; the longest where readers differ in clips or GPUs."""
    readers: dict[str, list[Job]] = {}
    for job in jobs:
        if job.fits and job.store is not None:
            readers.setdefault(job.store, []).append(job)
    return [
        Encoding(
            store,
            max(job.clips.total for job in members),
            max(job.clips.total * job.seconds.encode for job in members),
            len(members),
        )
        for store, members in readers.items()
    ]


def sweep_seconds(jobs: Sequence[Job]) -> float:
    """Seconds of all that fit, and of the encoding that they share."""
    return sum(job.total_s for job in jobs) + sum(encoding.seconds for encoding in encodings(jobs))


def num_fitting(jobs: Sequence[Job]) -> int:
    """Combinations that can run."""
    return sum(job.fits for job in jobs)


def with_clips(jobs: Sequence[Job], max_clips: int) -> list[Job]:
    """The same with `data.max_clips=max_clips`."""
    return [replace(job, clips=replace(job.clips, train=min(job.clips.train, max_clips))) for job in jobs]


def largest_subset(jobs: Sequence[Job], budget_s: float) -> int | None:
    """The most training clips, in whole hundreds and fewer than now, with which the sweep takes at most `budget_s`.

    None where none do.

    Every number is tried: under trainer.max_steps fewer clips are more epochs, and so more evaluations, not fewer.
    """
    most = max(job.clips.train for job in jobs)
    for max_clips in range((most - 1) // SUBSET_STEP * SUBSET_STEP, 0, -SUBSET_STEP):
        if sweep_seconds(with_clips(jobs, max_clips)) <= budget_s:
            return max_clips
    return None


@dataclass(frozen=True, slots=True)
class Proposal:
    """A change that saves hours.

    Attributes:
        override: As `train.py` takes it.
        cost: What is lost by it, for people.
        total_s: Of the sweep with it, and with those in front of it in the list.
        num_fitting: Combinations that fit their GPU with it; more than before count with their hours.
        keeps_quality: The scores stay as they are.
    """

    override: str
    cost: str
    total_s: float
    num_fitting: int
    keeps_quality: bool = False


Replan = Callable[[Sequence[str]], Sequence[Job] | None]
"""Plans the combinations again with more overrides; None where these do not go with them."""


def propose(jobs: Sequence[Job], budget_s: float, replan: Replan) -> list[Proposal]:
    """The changes, least loss first, that bring a sweep under its budget or as near as they can.

    Each on top of those before it.

    Args:
        jobs: As they are now.
        budget_s: Seconds that all may take.
        replan: The combinations with more overrides; None where these do not go with them. Others may fit the GPU then,
            and count.
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
        chosen.append(
            Proposal(f"data.max_clips={max_clips}", cost, sweep_seconds(with_clips(best, max_clips)), num_fitting(best))
        )
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
        result.append(
            proposal if jobs is None else replace(proposal, total_s=sweep_seconds(jobs), num_fitting=num_fitting(jobs))
        )
    return result
