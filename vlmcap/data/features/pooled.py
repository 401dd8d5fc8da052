"""Features that were averaged over neighbouring patches before they were stored."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from vlmcap.data.features.dataset import FeatureDataset
from vlmcap.types import Clip, GridTHW, Sample, Skipped


def pooled_grid(grid_thw: GridTHW, size: int) -> GridTHW:
    """A clip's size in patches after windows of `size` × `size` were averaged, those at an uneven edge included."""
    num_frames, rows, columns = grid_thw
    return num_frames, math.ceil(rows / size), math.ceil(columns / size)


class PooledFeatureDataset(FeatureDataset):
    """A `FeatureDataset` whose clips say the size that their features have now; the store knows that of the encoder.

    Args:
        clips: As there.
        hashes: As there.
        store: As there.
        size: Patches a side that were averaged.
    """

    def __init__(self, clips: Sequence[Clip], hashes: Any, store: Any, size: int) -> None:
        super().__init__(clips, hashes, store)
        self.size = size

    def __getitem__(self, key: int | tuple[int, int]) -> Sample | Skipped:
        item = super().__getitem__(key)
        if isinstance(item, Skipped) or item.grid_thw is None:
            return item
        return replace(item, grid_thw=pooled_grid(item.grid_thw, self.size))
