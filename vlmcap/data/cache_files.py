"""The two files of a feature cache: an index, and rows of raw numbers that a writer appends.

Legend: N clips, B batch, F frames, P patches a frame, Dv vision width, H/W pixels.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, astuple, dataclass, field
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from vlmcap.data.collate import stack_padded
from vlmcap.errors import UserError
from vlmcap.types import GridTHW, Sample, Skipped

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
_FORMAT = 2


def torch_dtype(dtype: str) -> torch.dtype:
    """The torch type of a key of `DTYPES`; `UserError` for another name."""
    if dtype not in DTYPES:
        raise UserError(f"cache.dtype must be one of {', '.join(DTYPES)}, not '{dtype}'")
    return DTYPES[dtype]


@dataclass(frozen=True, slots=True)
class CacheRow:
    """Where a clip's numbers begin, in numbers, and its size: F frames of P patches, and the grid where it is the clip's own."""

    offset: int
    num_frames: int
    num_patches: int
    grid_thw: GridTHW | None


@dataclass(frozen=True, slots=True)
class CacheIndex:
    """What a cache holds: type, Dv, the row of each clip, and the reasons for skipped clips."""

    dtype: str
    embed_dim: int
    rows: dict[str, CacheRow]
    skipped: dict[str, str]

    @property
    def num_bytes(self) -> int:
        """Size of the rows together."""
        return sum(row.num_frames * row.num_patches for row in self.rows.values()) * self.embed_dim * torch_dtype(self.dtype).itemsize


def read_index(folder: Path) -> CacheIndex | None:
    """The index of a whole cache; None where one is missing, torn or of another format."""
    try:
        raw: dict[str, Any] = json.loads((folder / "index.json").read_text(encoding="utf-8"))
        if raw["format"] != _FORMAT:
            return None
        rows = {name: _row(*row) for name, row in raw["rows"].items()}
        index = CacheIndex(raw["dtype"], raw["embed_dim"], rows, raw["skipped"])
        return index if (folder / "features.bin").stat().st_size == index.num_bytes else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _row(offset: int, num_frames: int, num_patches: int, grid_thw: list[int] | None) -> CacheRow:
    """Out of JSON, which knows no tuples."""
    return CacheRow(offset, num_frames, num_patches, None if grid_thw is None else (grid_thw[0], grid_thw[1], grid_thw[2]))


def write_index(path: Path, index: CacheIndex) -> None:
    """Write the index as JSON, down to the disk."""
    plain = asdict(index) | {"format": _FORMAT, "rows": {name: astuple(row) for name, row in index.rows.items()}}
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
    embed_dim: int = 0
    num_numbers: int = 0
    rows: dict[str, CacheRow] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    def add(self, batch: list[Sample | Skipped], encode: Callable[[Tensor, Sequence[GridTHW] | None], Tensor]) -> None:
        """Append the features of the samples of a batch, without padding, and note those skipped.

        Raises:
            UserError: As told for `FeatureCache.build`.
        """
        self.skipped |= {item.clip.id: item.reason for item in batch if isinstance(item, Skipped)}
        samples = [item for item in batch if isinstance(item, Sample)]
        frames = stack_padded([sample.frames for sample in samples])
        if frames is None:
            assert not samples, "features are built from samples with frames"
            return
        grids = [sample.grid_thw for sample in samples if sample.grid_thw is not None]
        assert len(grids) in (0, len(samples)), "a batch mixes clips with a size of their own and without"
        for sample, features in zip(samples, encode(frames, grids or None).detach(), strict=True):
            own = features if sample.grid_thw is None else features[: sample.grid_thw[0], : sample.grid_thw[1] * sample.grid_thw[2]]
            self._append(sample, own)

    def _append(self, sample: Sample, features: Tensor) -> None:
        assert sample.clip.id not in self.rows, f"clip {sample.clip.id} came twice"
        stored = features.to(torch_dtype(self.dtype)).cpu().contiguous()
        self._check(sample, features, stored)
        num_frames, num_patches, self.embed_dim = stored.shape
        self.file.write(stored.view(torch.uint8).numpy().data)
        self.rows[sample.clip.id] = CacheRow(self.num_numbers, num_frames, num_patches, sample.grid_thw)
        self.num_numbers += stored.numel()

    def _check(self, sample: Sample, features: Tensor, stored: Tensor) -> None:
        first = next(iter(self.rows.values()), None)
        if first is None:
            needed, free = self.num_clips * stored.nbytes, shutil.disk_usage(self.root).free
            if needed > free:
                raise UserError(
                    f"the feature cache needs {needed / 1e9:.1f} GB in {self.root}, where {free / 1e9:.1f} GB are free: "
                    "set cache.enabled=false, lower data.num_frames or free the space"
                )
        elif sample.grid_thw is None and tuple(stored.shape[:2]) != (first.num_frames, first.num_patches):
            raise UserError(
                f"features of clip {sample.clip.id} are {tuple(stored.shape[:2])}, earlier ones {(first.num_frames, first.num_patches)}, "
                "and cannot share a cache: set cache.enabled=false"
            )
        if not torch.isfinite(stored).all():
            mend = (
                f"overflow cache.dtype={self.dtype}: set cache.dtype=bfloat16"
                if torch.isfinite(features).all()
                else "are not finite: the encoder overflows, choose another precision"
            )
            raise UserError(f"features of clip {sample.clip.id} {mend}")

    def finish(self) -> CacheIndex:
        """The index of what was written; `UserError` if that is nothing."""
        assert len(self.rows) + len(self.skipped) == self.num_clips, "the batches did not hold all clips once each"
        if not self.rows:
            reason = next(iter(self.skipped.values()), "there are no clips")
            raise UserError(f"none of {self.num_clips} clips can be cached: {reason}")
        return CacheIndex(self.dtype, self.embed_dim, self.rows, self.skipped)
