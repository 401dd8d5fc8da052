"""The two files of a feature cache: an index, and rows of raw numbers that a writer appends.

Legend: N clips, B batch, F frames, P patches a frame, Dv vision width, H/W pixels.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from vlmcap.errors import UserError
from vlmcap.types import Clip, Sample, Skipped

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
_FORMAT = 1


def torch_dtype(dtype: str) -> torch.dtype:
    """The torch type of a key of `DTYPES`; `UserError` for another name."""
    if dtype not in DTYPES:
        raise UserError(f"cache.dtype must be one of {', '.join(DTYPES)}, not '{dtype}'")
    return DTYPES[dtype]


@dataclass(frozen=True, slots=True)
class CacheIndex:
    """What a cache holds: type, shape (N, F, P, Dv), row of each clip, and the reasons for skipped clips."""

    dtype: str
    shape: tuple[int, ...]
    rows: dict[str, int]
    skipped: dict[str, str]

    @property
    def num_bytes(self) -> int:
        """Size of the rows together."""
        return math.prod(self.shape) * torch_dtype(self.dtype).itemsize


def read_index(folder: Path) -> CacheIndex | None:
    """The index of a whole cache; None where one is missing, torn or of another format."""
    try:
        raw: dict[str, Any] = json.loads((folder / "index.json").read_text(encoding="utf-8"))
        if raw["format"] != _FORMAT:
            return None
        index = CacheIndex(raw["dtype"], tuple(raw["shape"]), raw["rows"], raw["skipped"])
        return index if (folder / "features.bin").stat().st_size == index.num_bytes else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_index(path: Path, index: CacheIndex) -> None:
    """Write the index as JSON, down to the disk."""
    plain = {"format": _FORMAT, "dtype": index.dtype, "shape": index.shape, "rows": index.rows, "skipped": index.skipped}
    with path.open("wb") as file:
        file.write(json.dumps(plain, ensure_ascii=False).encode())
        sync(file)


def sync(file: IO[bytes]) -> None:
    """Have the bytes on the disk before the rename that vouches for them."""
    file.flush()
    os.fsync(file.fileno())


@dataclass
class FeatureWriter:
    """Appends the features of batches to a file; a full disk fails here as an exception, which a memory map would answer with a signal."""

    file: IO[bytes]
    root: Path
    dtype: str
    num_clips: int
    shape: tuple[int, ...] = ()
    rows: dict[str, int] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    def add(self, batch: list[Sample | Skipped], encode: Callable[[Tensor], Tensor]) -> None:
        """Append the features of the samples of a batch, and note those skipped.

        Raises:
            UserError: As told for `FeatureCache.build`.
        """
        self.skipped |= {item.clip.id: item.reason for item in batch if isinstance(item, Skipped)}
        samples = [item for item in batch if isinstance(item, Sample)]
        frames = [sample.frames for sample in samples if sample.frames is not None]
        assert len(frames) == len(samples), "features are built from samples with frames"
        if not samples:
            return
        features = encode(torch.stack(frames)).detach()
        stored = features.to(torch_dtype(self.dtype)).cpu().contiguous()
        self._check([sample.clip for sample in samples], features, stored)
        self.file.write(stored.view(torch.uint8).numpy().data)
        for sample in samples:
            assert sample.clip.id not in self.rows, f"clip {sample.clip.id} came twice"
            self.rows[sample.clip.id] = len(self.rows)

    def _check(self, clips: list[Clip], features: Tensor, stored: Tensor) -> None:
        if not self.shape:
            self.shape = tuple(stored.shape[1:])
            needed, free = self.num_clips * stored[0].nbytes, shutil.disk_usage(self.root).free
            if needed > free:
                raise UserError(
                    f"the feature cache needs {needed / 1e9:.1f} GB in {self.root}, where {free / 1e9:.1f} GB are free: "
                    "set cache.enabled=false, lower data.num_frames or free the space"
                )
        if tuple(stored.shape[1:]) != self.shape:
            raise UserError(
                f"features of clip {clips[0].id} are {tuple(stored.shape[1:])}, earlier ones {self.shape}, and cannot share a cache: "
                "set cache.enabled=false"
            )
        is_bad = ~torch.isfinite(stored).flatten(1).all(dim=1)
        if is_bad.any():
            row = int(is_bad.nonzero()[0])
            mend = (
                f"overflow cache.dtype={self.dtype}: set cache.dtype=bfloat16"
                if torch.isfinite(features[row]).all()
                else "are not finite: the encoder overflows, choose another precision"
            )
            raise UserError(f"features of clip {clips[row].id} {mend}")

    def finish(self) -> CacheIndex:
        """The index of what was written; `UserError` if that is nothing."""
        assert len(self.rows) + len(self.skipped) == self.num_clips, "the batches did not hold all clips once each"
        if not self.rows:
            reason = next(iter(self.skipped.values()), "there are no clips")
            raise UserError(f"none of {self.num_clips} clips can be cached: {reason}")
        return CacheIndex(self.dtype, (len(self.rows), *self.shape), self.rows, self.skipped)
