"""Features of a frozen encoder on disk: computed once a clip, read by row.

Legend: N clips, B batch, F frames, P patches a frame, Dv vision width, H/W pixels.

A cache is a folder with `features.bin` (raw rows, one after the other, as long as each clip's grid needs) and `index.json`. It is
written under another name and renamed when complete, so that whatever bears its name can be trusted.
"""

from __future__ import annotations

import math
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vlmcap.data.cache_files import DTYPES, CacheIndex, FeatureWriter, read_index, sync, torch_dtype, write_index
from vlmcap.data.fingerprint import cache_key, clip_fingerprint, clips_fingerprint
from vlmcap.errors import UserError
from vlmcap.types import GridTHW, Sample, Skipped

__all__ = ["DTYPES", "FeatureCache", "cache_key", "clip_fingerprint", "clips_fingerprint", "size_bytes"]


def size_bytes(num_clips: int, num_frames: int, num_patches: int, embed_dim: int, dtype: str) -> int:
    """Bytes that a cache of N clips takes, known before it is built: N x F x P x Dv x the size of a number."""
    return num_clips * num_frames * num_patches * embed_dim * torch_dtype(dtype).itemsize


class FeatureCache:
    """Features (F, P, Dv) by clip id, in the folder `root/key`; safe to share with data workers.

    Args:
        root: Folder of all caches; made by `build`.
        key: From `cache_key`, over everything that the features depend on: encoder, its weights and image size, frames, dtype, and
            `clips_fingerprint` of the split.

    Raises:
        ValueError: The key is no plain file name.
    """

    def __init__(self, root: str | Path, key: str) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_-]+", key):
            raise ValueError(f"a cache key has only letters, digits, - and _, unlike '{key}'")
        self.root, self.key = Path(root), key
        self.folder = self.root / key
        self._index: CacheIndex | None = None

    @property
    def is_complete(self) -> bool:
        """Whether the cache can be read; a torn or foreign folder counts as none."""
        if self._index is None:
            self._index = read_index(self.folder)
        return self._index is not None

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(N, F, P, Dv), skipped clips not counted, F and P those of the largest clip."""
        index = self._opened()
        rows = index.rows.values()
        return len(rows), max(row.num_frames for row in rows), max(row.num_patches for row in rows), index.embed_dim

    @property
    def dtype(self) -> torch.dtype:
        """Type of the stored numbers."""
        return torch_dtype(self._opened().dtype)

    @property
    def skipped(self) -> dict[str, str]:
        """Id -> reason of the clips that could not be read when the cache was built."""
        return self._opened().skipped

    def __contains__(self, clip_id: object) -> bool:
        """Whether the clip was seen when the cache was built, skipped ones included."""
        index = self._opened()
        return clip_id in index.rows or clip_id in index.skipped

    def read(self, clip_id: str) -> Tensor:
        """The features (F, P, Dv) of a clip, in memory of their own.

        Raises:
            KeyError: The cache has no features of this clip.
        """
        index = self._opened()
        row, dtype = index.rows[clip_id], torch_dtype(index.dtype)
        shape = (row.num_frames, row.num_patches, index.embed_dim)
        # A plain read: a memory map would count all pages ever touched as memory of each worker.
        raw = np.fromfile(self.folder / "features.bin", np.uint8, math.prod(shape) * dtype.itemsize, offset=row.offset * dtype.itemsize)
        return torch.from_numpy(raw).view(dtype).reshape(shape)

    def grid_thw(self, clip_id: str) -> GridTHW | None:
        """A clip's size in patches; None where it is the encoder's own."""
        return self._opened().rows[clip_id].grid_thw

    def build(
        self,
        batches: Iterable[list[Sample | Skipped]],
        encode: Callable[[Tensor, Sequence[GridTHW] | None], Tensor],
        num_clips: int,
        dtype: str = "float16",
        *,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Fill the cache, or do nothing if it is complete; a second process waits for the first and then finds it so.

        Args:
            batches: Lists of samples with frames, together all `num_clips` clips, once each.
            encode: Stacked frames and the clips' sizes, if they have their own -> (B, F, P, Dv), floating, on any device.
            num_clips: N, skipped clips included.
            dtype: A key of `DTYPES`.
            progress: Called with (clips done, `num_clips`) after each batch.

        Raises:
            UserError: The disk is too full, no clip is readable, features are not finite or overflow `dtype`, or their shape varies.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        with _lock(self.root / f".{self.key}.lock", is_blocking=True):
            if self.is_complete:
                return
            _remove_leftovers(self.root, but=self.key)
            temporary = self.root / f".{self.key}.building"
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            try:
                with (temporary / "features.bin").open("wb") as file:
                    writer = FeatureWriter(file, self.root, dtype, num_clips)
                    for batch in batches:
                        writer.add(batch, encode)
                        if progress is not None:
                            progress(len(writer.rows) + len(writer.skipped), num_clips)
                    sync(file)
                write_index(temporary / "index.json", writer.finish())
                shutil.rmtree(self.folder, ignore_errors=True)  # a torn or foreign folder of this name
                os.replace(temporary, self.folder)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)

    def _opened(self) -> CacheIndex:
        if not self.is_complete or self._index is None:
            raise UserError(f"there is no complete feature cache in {self.folder}: set cache.enabled=false, or let train.py build it")
        return self._index


def _remove_leftovers(root: Path, but: str) -> None:
    """Delete what killed builds of other keys left; one still running holds its lock."""
    for folder in root.glob(".*.building"):
        key = folder.name[1 : -len(".building")]
        if key != but:
            with _lock(root / f".{key}.lock", is_blocking=False) as is_ours:
                if is_ours:
                    shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _lock(path: Path, *, is_blocking: bool) -> Iterator[bool]:
    """Whether the lock is ours while the block runs; it dies with the process. Without `fcntl` (Windows) it always is."""
    try:
        import fcntl
    except ImportError:
        yield True
        return
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if is_blocking else fcntl.LOCK_NB))
        except OSError:
            yield False
            return
        yield True
