"""Data sets of clips whose features are read from a store.

Legend: F frames, P patches per frame, Dv vision width.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from vlmcap.data.features.content_hash import UNREADABLE
from vlmcap.data.features.shards import DAMAGED, DamagedEntryError
from vlmcap.data.features.store import FeatureStore
from vlmcap.errors import UserError
from vlmcap.types import Clip, GridTHW, Sample, Skipped


class FeatureDataset(Dataset[Sample | Skipped]):
    """Clips with the frozen encoder's features (F, P, Dv), read from a store.

    Clips that could not be read when the store was filled stay skipped. A clip whose features are damaged is skipped
    too, and its entry is removed, so that the next run encodes it again.

    Args:
        clips: Clips, in the order of the indices.
        hashes: S32 (N,) content hash of each clip.
        store: Store that contains all of them.

    Raises:
        UserError: The store lacks some of the clips.
    """

    def __init__(self, clips: Sequence[Clip], hashes: NDArray[np.bytes_], store: FeatureStore) -> None:
        assert len(clips) == len(hashes)
        self.clips, self.hashes, self.store = clips, hashes, store
        missing = store.missing(hashes)
        if len(missing):
            raise UserError(
                f"the feature store {store.folder} lacks {len(missing)} of {len(clips)} clips, the first being "
                f"{clips[int(missing[0])].id}; start again to encode them"
            )

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, key: int | tuple[int, int]) -> Sample | Skipped:
        index = key[1] if isinstance(key, tuple) else key  # features are the same in each epoch
        clip, content = self.clips[index], bytes(self.hashes[index])
        if content == UNREADABLE:
            return Skipped(clip, f"{clip.video} cannot be opened")
        if (reason := self.store.skipped(content)) is not None:
            return Skipped(clip, reason)
        try:
            features, grid_thw = self.store.read(content)
        except DamagedEntryError:
            self.store.drop_damaged(content)
            warnings.warn(f"clip {clip.id}: {DAMAGED}", stacklevel=2)
            return Skipped(clip, DAMAGED, is_final=False)
        return Sample(clip, features=features, grid_thw=grid_thw, times_s=self.store.times_s(content))


def pooled_grid(grid_thw: GridTHW, size: int) -> GridTHW:
    """Returns a clip's size in patches after averaging windows of `size` × `size`, also smaller ones at the edges."""
    num_frames, rows, columns = grid_thw
    return num_frames, math.ceil(rows / size), math.ceil(columns / size)


class PooledFeatureDataset(FeatureDataset):
    """A `FeatureDataset` that reports the size of the pooled features, where the store knows that of the encoder's.

    Args:
        clips: As for `FeatureDataset`.
        hashes: As for `FeatureDataset`.
        store: As for `FeatureDataset`.
        size: Side of the averaged windows in patches.
    """

    def __init__(self, clips: Sequence[Clip], hashes: Any, store: Any, size: int) -> None:
        super().__init__(clips, hashes, store)
        self.size = size

    def __getitem__(self, key: int | tuple[int, int]) -> Sample | Skipped:
        item = super().__getitem__(key)
        if isinstance(item, Skipped) or item.grid_thw is None:
            return item
        return replace(item, grid_thw=pooled_grid(item.grid_thw, self.size))
