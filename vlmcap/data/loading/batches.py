"""Assignment of clips to training batches, and the position of a run inside an epoch.

A plan gives each clip a *slot*, groups slots into batches, and divides them into *buckets* of similar length. It is
made one time; an epoch only exchanges clips inside their buckets and shuffles the order of the batches. So every epoch
sees each clip exactly once, next to other clips than before, in batches that keep their limits, and the number of
batches never changes, which learning rate schedules count in steps.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

from vlmcap.errors import UserError

Draw = tuple[int, int]
"""Key of a training sample, (epoch, index), from which a data set may draw frames at random.

Keys in evaluation are plain indices.
"""

Indices = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """The batches of one epoch before shuffling; N clips in G batches.

    Attributes:
        clips: (N,) clip in each slot.
        buckets: (N,) bucket of each slot, ascending; clips of one bucket may exchange their slots.
        slots: (N,) all slots, batch by batch.
        bounds: (G + 1,) start of each batch and the end; batch g is `slots[bounds[g]:bounds[g + 1]]`.
    """

    clips: Indices
    buckets: Indices
    slots: Indices
    bounds: Indices

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def divided_by(self, world_size: int) -> BatchPlan:
        """Returns the plan with large batches halved until all ranks get equally many, or all are single clips."""
        bounds = self.bounds
        while (len(bounds) - 1) % world_size:
            sizes = np.diff(bounds)
            largest = int(sizes.argmax())
            if sizes[largest] < 2:
                break
            # A new boundary in the middle of the largest batch.
            bounds = np.insert(bounds, largest + 1, bounds[largest] + sizes[largest] // 2)
        return replace(self, bounds=bounds)

    @property
    def digest(self) -> str:
        """Eight hexadecimal digits that identify clips, buckets and batches."""
        content = hashlib.sha256()
        for array in (self.clips, self.buckets, self.slots, self.bounds):
            content.update(np.ascontiguousarray(array).data)
        return content.hexdigest()[:8]


def shuffled_plan(num_clips: int, batch_size: int) -> BatchPlan:
    """Plans batches of `batch_size` arbitrary clips; the last batch holds the rest."""
    clips = np.arange(num_clips)
    return BatchPlan(clips, np.zeros_like(clips), clips, _batch_bounds(0, num_clips, batch_size))


def length_plan(lengths: Indices, *, batch_size: int = 1, max_tokens: int | None = None) -> BatchPlan:
    """Plans batches of clips of similar length, to reduce padding.

    The number of batches per bucket is the cube root of their total, 11 of 1 250 and 50 of 125 000: with more clips,
    batches become more even and more varied.

    Args:
        lengths: (N,) tokens of each clip's whole sequence.
        batch_size: Clips per batch, unless `max_tokens` is given.
        max_tokens: Largest number of tokens in a batch, padding included: its clips times the longest of its bucket. No
            clip may be longer.
    """
    assert max_tokens is None or not len(lengths) or lengths.max() <= max_tokens
    order = np.argsort(-lengths, kind="stable")  # the longest clip first
    ordered = lengths[order]
    # Clips that fit into the budget if all are as long as this one.
    batch_sizes = np.full_like(ordered, batch_size) if max_tokens is None else max_tokens // ordered
    # The cube root of the number of batches: more buckets pad less, and fewer shuffle more.
    batches_per_bucket = math.ceil((1 / batch_sizes).sum() ** (1 / 3))
    buckets, bounds = np.empty_like(order), [np.zeros(1, dtype=np.int64)]
    start = bucket = 0
    while start < len(order):
        batch_size = int(batch_sizes[start])
        # The first clip is the longest of the bucket and limits the size of all its batches.
        end = min(start + batches_per_bucket * batch_size, len(order))
        buckets[start:end] = bucket
        bounds.append(_batch_bounds(start, end, batch_size)[1:])
        start, bucket = end, bucket + 1
    return BatchPlan(order, buckets, np.arange(len(order)), np.concatenate(bounds))


def packed_plan(lengths: Indices, max_tokens: int) -> BatchPlan:
    """Plans packed rows of up to `max_tokens`, by first-fit decreasing.

    Each clip is packed as if it were as long as the longest of its bucket, so that any clip of a bucket fits into any
    of its slots. Equal rows are planned together, which takes seconds for a million clips.

    Args:
        lengths: (N,) tokens of each clip's whole sequence.
        max_tokens: Largest number of tokens in a row. No clip may be longer.
    """
    assert not len(lengths) or 0 < lengths.min() <= lengths.max() <= max_tokens
    order = np.argsort(-lengths, kind="stable")
    # About √N buckets of √N clips: rows are planned by the longest clip of each bucket.
    buckets = np.arange(len(order)) // max(1, math.isqrt(len(order)))
    starts = np.flatnonzero(np.diff(buckets, prepend=-1))
    counts = np.diff(np.append(starts, len(order)))
    sizes = lengths[order[starts]]
    slots, widths = [np.empty(0, dtype=np.int64)], [np.zeros(1, dtype=np.int64)]
    while counts.any():
        # 1. Fill one row, and repeat it as often as its buckets have clips left.
        row = _fill_row(sizes, counts, max_tokens)
        repeats = min(int(counts[bucket]) // taken for bucket, taken in row.items())
        # 2. Take the next clips of each bucket, `taken` for each of the equal rows.
        columns = []
        for bucket, taken in row.items():
            next_slots = starts[bucket] + np.arange(repeats * taken)
            columns.append(next_slots.reshape(repeats, taken))  # (repeats * taken,) -> (repeats, taken)
            starts[bucket] += repeats * taken
            counts[bucket] -= repeats * taken
        rows = np.concatenate(columns, axis=1)  # (repeats, clips per row)
        slots.append(rows.ravel())
        widths.append(np.full(repeats, rows.shape[1]))
    return BatchPlan(order, buckets, np.concatenate(slots), np.concatenate(widths).cumsum())


def _fill_row(sizes: Indices, counts: Indices, max_tokens: int) -> dict[int, int]:
    """Maps buckets to the number of clips a row takes of them, the largest first; `sizes` must be descending."""
    row: dict[int, int] = {}
    free = max_tokens
    for bucket in np.flatnonzero(counts):
        taken = min(int(counts[bucket]), free // int(sizes[bucket]))
        if taken:
            row[int(bucket)] = taken
            free -= taken * int(sizes[bucket])
    return row


def _batch_bounds(start: int, end: int, size: int) -> Indices:
    """Returns `start`, then each multiple of `size` after it, then `end`."""
    return np.append(np.arange(start, end, size), end)


class BatchSampler(Sampler[list[Draw]]):
    """Yields the batches of one rank, as lists of `Draw`.

    Their order is a function of the plan, seed, epoch, rank and number of ranks alone.

    Ranks take neighbouring batches, which are of similar length, so that none waits long for another. Every rank takes
    the same number of steps and no clip comes twice: where batches of one clip cannot be divided evenly, some ranks get
    an empty batch in one step.

    It is stateful as torchdata's loader requires: the state is the number of batches drawn, which the loader keeps
    beside each batch that its workers read ahead.

    Args:
        plan: Batches of all ranks.
        seed: Non-negative seed.
        rank: Rank of this process, 0 to world_size - 1.
        world_size: Number of processes that share the epoch.
        content: Digest of the clips, since a position is only valid for the same clips.

    Raises:
        ValueError: A number is out of its range.
    """

    def __init__(
        self, plan: BatchPlan, *, seed: int = 0, rank: int = 0, world_size: int = 1, content: str = ""
    ) -> None:
        if seed < 0 or not 0 <= rank < world_size:
            raise ValueError(
                f"seed must not be negative and rank must be in 0 to {world_size - 1}, but they are {seed} and {rank}"
            )
        self.plan = plan.divided_by(world_size)
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.digest = "-".join([self.plan.digest, str(seed), str(world_size), content])
        self._epoch, self._start, self._drawn = 0, 0, 0

    def __len__(self) -> int:
        """Number of batches of this rank in a whole epoch, regardless of where it starts."""
        return -(-len(self.plan) // self.world_size)

    @property
    def sampler(self) -> BatchSampler:
        """The sampler itself: Lightning passes the epoch to a loader's `batch_sampler.sampler`."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Uses the order of `epoch` in the next iteration, which starts at its first batch or at a loaded state."""
        if epoch != self._epoch:
            self._epoch, self._start = epoch, 0

    def position(self, epoch: int, batches: int) -> dict[str, Any]:
        """Returns the state, as plain data, after `batches` batches of an epoch; after the last, the next epoch."""
        if batches >= len(self):
            epoch, batches = epoch + 1, 0
        return {"epoch": epoch, "batches": batches, "order": self.digest}

    def state_dict(self) -> dict[str, Any]:
        """Returns the position after the batches drawn so far."""
        return self.position(self._epoch, self._drawn)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Lets the next iteration start at a position.

        Raises:
            UserError: The position is inside an epoch of different batches.
        """
        if state["batches"] and state["order"] != self.digest:
            raise UserError(
                "the checkpoint was saved inside an epoch whose batches have changed since; resume with the same "
                "clips, seed, number of devices, data.batch_size, data.batching and data.max_tokens_per_batch, or from "
                "a checkpoint at the end of an epoch"
            )
        self._epoch, self._start, self._drawn = state["epoch"], state["batches"], state["batches"]

    def __iter__(self) -> Iterator[list[Draw]]:
        self._drawn = self._start  # now and not with the first batch, because the loader asks for the state before it
        return self._batches(self._epoch, self._start)

    def _batches(self, epoch: int, start: int) -> Iterator[list[Draw]]:
        clips, batches = self._epoch_order(epoch)
        slots, bounds = self.plan.slots, self.plan.bounds
        for drawn, batch in enumerate(batches[start:].tolist(), start + 1):
            self._drawn = drawn  # before the yield, because the loader keeps the state that follows the batch
            # An empty batch where the number of batches cannot be divided evenly.
            chosen = slots[bounds[batch] : bounds[batch + 1]] if batch < len(self.plan) else slots[:0]
            yield [(epoch, index) for index in clips[chosen].tolist()]
        self._start = 0

    def _epoch_order(self, epoch: int) -> tuple[Indices, Indices]:
        """Returns (N,) clips by slot, and the batches of this rank in order; those beyond the plan are empty."""
        plan = self.plan
        # The seed is a pair: with seed + epoch, seed 1 would have the orders of seed 0, one epoch late.
        generator = np.random.default_rng([self.seed, epoch])
        steps = np.arange(len(self))
        if len(plan.buckets) and plan.buckets[-1]:  # several buckets: shuffle inside each of them
            # Sorted by bucket, and at random within each.
            clips = plan.clips[np.lexsort((generator.random(len(plan.clips)), plan.buckets))]
            generator.shuffle(steps)
            # Sharded ranks need a batch before an empty one.
            if len(plan) % self.world_size and steps[0] == steps.max():
                steps = np.roll(steps, -1)
        else:  # a single bucket, whose clips may be in any order
            clips = generator.permutation(plan.clips)
        # Ranks take neighbouring batches of the plan in the same step.
        return clips, steps * self.world_size + self.rank
