"""An order of samples that can be taken up again anywhere."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler


class ResumableSampler(Sampler[int]):
    """Indices of one rank; their order is a function of (seed, epoch) alone, so a position in it is all that a checkpoint needs.

    Args:
        num_samples: Size of the data set.
        shuffle: A new order each epoch; otherwise ascending.
        seed: Non-negative.
        rank: Of this process, 0 to world_size - 1.
        world_size: Number of processes that share the epoch.
        pad: Repeat the first samples until all ranks have equally many (training: ranks wait for each other). False never repeats a
            sample, and some ranks have one less (evaluation: a repeated sample would count twice).

    Raises:
        ValueError: A number is out of its range.
    """

    def __init__(
        self, num_samples: int, *, shuffle: bool, seed: int = 0, rank: int = 0, world_size: int = 1, pad: bool | None = None
    ) -> None:
        if num_samples < 0 or seed < 0:
            raise ValueError(f"num_samples and seed must not be negative, but are {num_samples} and {seed}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in 0 to {world_size - 1}, not {rank}")
        self.num_samples, self.shuffle, self.seed = num_samples, shuffle, seed
        self.rank, self.world_size = rank, world_size
        self.pad = shuffle if pad is None else pad
        self.epoch = 0
        self._skip = 0

    def __len__(self) -> int:
        """Samples of this rank in a whole epoch, whatever was skipped."""
        whole, rest = divmod(self.num_samples, self.world_size)
        return whole + (rest > 0 if self.pad else self.rank < rest)

    def set_epoch(self, epoch: int) -> None:
        """Use the order of `epoch` from the next iteration on; a pending `skip` stays."""
        self.epoch = epoch

    def skip(self, num_samples: int) -> None:
        """Start the next iteration, and only that, after the first `num_samples` of this rank.

        At or past the end (a count in whole batches may overshoot by part of the last one) that iteration is empty.

        Raises:
            ValueError: `num_samples` is negative.
        """
        if num_samples < 0:
            raise ValueError(f"cannot skip {num_samples} samples")
        self._skip = num_samples

    def __iter__(self) -> Iterator[int]:
        start, self._skip = self._skip, 0
        return iter(self._order()[start:])

    def _order(self) -> list[int]:
        if self.shuffle:
            # A pair seeds the generator: seed + epoch would give seed 1 the orders of seed 0, one epoch late.
            order = np.random.default_rng([self.seed, self.epoch]).permutation(self.num_samples)
        else:
            order = np.arange(self.num_samples)
        if self.pad and self.num_samples:
            order = np.resize(order, -(-self.num_samples // self.world_size) * self.world_size)
        return [int(index) for index in order[self.rank :: self.world_size]]
