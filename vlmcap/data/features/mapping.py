"""Shards mapped into memory, and copies of tensors out of them."""

from __future__ import annotations

import math
import mmap
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vlmcap.data.features.index import ShardFile

_MAX_OPEN = 64


class MappedShards:
    """The shards read last; a map stays valid after its file is evicted and in a fork.

    Args:
        folder: Of the shards.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._maps: OrderedDict[str, mmap.mmap] = OrderedDict()

    def read(self, file: ShardFile, start: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A copy of the tensor that begins at byte `start`.

        Raises:
            OSError: The shard cannot be opened.
            ValueError: It is not the one that the index knows.
        """
        mapped = self._map(file)
        size = math.prod(shape) * dtype.itemsize
        # A copy: features that are used for long must not keep the map of a whole shard alive.
        copy = np.frombuffer(mapped, np.uint8, size, start).copy()
        _forget(mapped, start, size)
        return torch.from_numpy(copy).view(dtype).reshape(shape)

    def close(self) -> None:
        """Forget all maps."""
        self._maps.clear()

    def _map(self, file: ShardFile) -> mmap.mmap:
        mapped = self._maps.pop(file.name, None)
        if mapped is None:
            with (self.folder / file.name).open("rb") as stream:
                mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
            if len(mapped) != file.size:
                raise ValueError(f"{file.name} has changed")
            while len(self._maps) >= _MAX_OPEN:
                self._maps.popitem(last=False)
        self._maps[file.name] = mapped
        return mapped


def _forget(mapped: mmap.mmap, start: int, size: int) -> None:
    """Take the pages out of this process, not out of the system's cache: else they would count as memory of each worker that read them."""
    if hasattr(mmap, "MADV_DONTNEED"):
        first = start // mmap.PAGESIZE * mmap.PAGESIZE
        mapped.madvise(mmap.MADV_DONTNEED, first, start + size - first)
