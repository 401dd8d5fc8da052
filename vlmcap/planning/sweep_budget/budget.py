"""Hours of a sweep: of each combination, of all together, and ways to bring the sweep under its budget.

The clips that a run processes (every epoch of every stage, evaluations in the loop, whole splits at the end) are
multiplied with the seconds that its GPU needs per clip. Stored features are encoded once for all combinations that
read them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

HOUR_S = 3600.0
SUBSET_STEP = 100  # clips; a proposed subset is a multiple of it
_LEAST_GAIN = 0.01  # share of the seconds that a change must save to be proposed
# Override, cost and whether scores stay equal, in order of lost quality; a subset of the clips is tried last.
_CHANGES: tuple[tuple[str, str, bool], ...] = (
    ("cache.enabled=true", "no quality: disk for the features", True),
    ("evaluation.max_clips=32", "a coarser choice of the best checkpoint", False),
    ("projector.reducer=pool", "a quarter of the visual tokens, 2 × 2 averaged", False),
    ("data.num_frames=4", "fewer frames", False),
)


@dataclass(frozen=True, slots=True)
class ClipSeconds:
    """GPU seconds per clip.

    Attributes:
        train: Training step, including the encoder unless its features are stored.
        caption: Captioning from features.
        loss: Pass for the validation loss from features.
        encode: Encoder alone.
    """

    train: float
    caption: float
    loss: float
    encode: float


@dataclass(frozen=True, slots=True)
class NumClips:
    """Number of clips in each split."""

    train: int
    val: int
    test: int

    @property
    def total(self) -> int:
        """Clips of all splits."""
        return self.train + self.val + self.test


@dataclass(frozen=True, slots=True)
class Job:
    """One combination of a sweep.

    Attributes:
        name: Name that distinguishes it from the others.
        overrides: Overrides of its run.
        hardware: Name of the hardware profile.
        peak_gib: Peak memory.
        usable_gib: Memory of the GPU.
        seconds: GPU seconds per clip.
        clips: Number of clips.
        num_epochs: Epochs of all stages.
        every_n_epochs: Epochs from one evaluation to the next.
        max_eval_clips: Most validation clips that are captioned in the loop.
        max_trained: Clips that trainer.max_steps allows in all; None for no limit.
        store: Key of the feature store, equal for combinations that share it; None encodes the clips every time.
        refusal: Reason why its components cannot be combined; empty where they can.
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
        """Whether it can run; combinations that cannot run take no time."""
        return not self.refusal and self.peak_gib <= self.usable_gib

    @property
    def num_trained(self) -> int:
        """Clips that are processed in training, over all epochs."""
        whole = self.num_epochs * self.clips.train
        return whole if self.max_trained is None else min(whole, self.max_trained)

    @property
    def num_in_loop(self) -> int:
        """Clips that are captioned during training, over all evaluations."""
        num_epochs = math.ceil(self.num_trained / self.clips.train)
        # An evaluation after every n-th epoch.
        return num_epochs // self.every_n_epochs * min(self.max_eval_clips, self.clips.val)

    @property
    def training_s(self) -> float:
        """Seconds of all training steps."""
        return self.num_trained * self.seconds.train if self.fits else 0.0

    @property
    def evaluation_s(self) -> float:
        """Seconds of captions and validation loss in the loop, and of captioning the other splits at the end."""
        if not self.fits:
            return 0.0
        encode_s = self.seconds.encode if self.store is None else 0.0
        in_loop_s = self.seconds.caption + self.seconds.loss + encode_s
        return self.num_in_loop * in_loop_s + (self.clips.val + self.clips.test) * (self.seconds.caption + encode_s)

    @property
    def total_s(self) -> float:
        """Seconds of training and evaluation."""
        return self.training_s + self.evaluation_s


@dataclass(frozen=True, slots=True)
class Encoding:
    """The encoding of features that several combinations read.

    Attributes:
        store: Key of the feature store.
        num_clips: Clips of all splits.
        seconds: GPU seconds of the encoder.
        num_readers: Number of combinations that read the features.
    """

    store: str
    num_clips: int
    seconds: float
    num_readers: int

    @property
    def encoder(self) -> str:
        """Name of the encoder, with which the key begins."""
        return self.store.partition(" ")[0]


def encodings(jobs: Sequence[Job]) -> list[Encoding]:
    """Returns what is encoded, in order of the first reader; the longest where readers differ in clips or GPUs."""
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
    """Returns the seconds of all combinations that fit, and of the encoding that they share."""
    return sum(job.total_s for job in jobs) + sum(encoding.seconds for encoding in encodings(jobs))


def num_fitting(jobs: Sequence[Job]) -> int:
    """Returns the number of combinations that can run."""
    return sum(job.fits for job in jobs)


def with_clips(jobs: Sequence[Job], max_clips: int) -> list[Job]:
    """Returns the combinations with `data.max_clips=max_clips`."""
    return [replace(job, clips=replace(job.clips, train=min(job.clips.train, max_clips))) for job in jobs]


def largest_subset(jobs: Sequence[Job], budget_s: float) -> int | None:
    """Returns the most training clips, in whole hundreds and fewer than now, that keep the sweep within `budget_s`.

    Every number is tried, as under trainer.max_steps fewer clips mean more epochs, and so more evaluations.

    Returns:
        The number of clips, or None where even the fewest take too long.
    """
    most = max(job.clips.train for job in jobs)
    # From the largest multiple below the current number down.
    for max_clips in range((most - 1) // SUBSET_STEP * SUBSET_STEP, 0, -SUBSET_STEP):
        if sweep_seconds(with_clips(jobs, max_clips)) <= budget_s:
            return max_clips
    return None


@dataclass(frozen=True, slots=True)
class Proposal:
    """A change that saves hours.

    Attributes:
        override: Override as `train.py` takes it.
        cost: What is lost by it, in words.
        total_s: Seconds of the sweep with this change and those before it in the list.
        num_fitting: Combinations that then fit their GPU; more than before count with their hours.
        keeps_quality: Whether the scores stay as they are.
    """

    override: str
    cost: str
    total_s: float
    num_fitting: int
    keeps_quality: bool = False


Replan = Callable[[Sequence[str]], Sequence[Job] | None]
"""Plans the combinations again with more overrides; None where these cannot be combined."""


def propose(jobs: Sequence[Job], budget_s: float, replan: Replan) -> list[Proposal]:
    """Proposes changes that bring a sweep under its budget, or as near as possible, in order of lost quality.

    Args:
        jobs: The combinations as configured.
        budget_s: Seconds for the whole sweep.
        replan: Plans the combinations with more overrides; None where these cannot be combined. More combinations may
            then fit their GPU, and count.
    """
    # 1. Take each change that saves time, until the sweep is within its budget.
    chosen: list[Proposal] = []
    best = jobs
    for override, cost, keeps_quality in _CHANGES:
        if sweep_seconds(best) <= budget_s:
            break
        changed = replan([*(proposal.override for proposal in chosen), override])
        if changed is not None and _saves(best, changed):
            best = changed
            chosen.append(Proposal(override, cost, sweep_seconds(best), num_fitting(best), keeps_quality))
    if sweep_seconds(best) <= budget_s:
        return _without_needless(chosen, budget_s, replan)
    # 2. If all of them are not enough, train on a subset of the clips.
    max_clips = largest_subset(best, budget_s)
    if max_clips is not None:
        most = max(job.clips.train for job in best)
        cost = f"{max_clips / most:.0%} of the training clips, the first of the seeded order"
        chosen.append(
            Proposal(f"data.max_clips={max_clips}", cost, sweep_seconds(with_clips(best, max_clips)), num_fitting(best))
        )
    return chosen


def _saves(before: Sequence[Job], after: Sequence[Job]) -> bool:
    """Returns whether the combinations that fitted still fit, and take less time together."""
    pairs = [(old, new) for old, new in zip(before, after, strict=True) if old.fits]
    # A change must not make a combination that fitted fail.
    if not all(new.fits for _, new in pairs):
        return False
    old_s, new_s = sweep_seconds([old for old, _ in pairs]), sweep_seconds([new for _, new in pairs])
    return new_s < (1 - _LEAST_GAIN) * old_s


def _without_needless(chosen: Sequence[Proposal], budget_s: float, replan: Replan) -> list[Proposal]:
    """Removes changes that cost quality and that the budget does not need."""
    kept = list(chosen)
    # The last change brought the sweep under its budget.
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
