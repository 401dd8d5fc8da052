"""Shard files: safetensors with the features of some clips, each whole or not there.

Legend: F frames, P patches a frame, Dv vision width.

A tensor is named by its clip's content hash, the scales of int8 by that and `.scale`. The metadata say the rest: sizes
in patches, times of frames, a checksum of each clip's entry, clips that could not be read, and the error of the stored
numbers.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import secrets
import time
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from vlmcap.data.features.precision import DTYPES, ErrorSums, dequantize, is_finite, measure, quantize, stored_type
from vlmcap.data.features.recipe import Recipe
from vlmcap.data.loading.collate import stack_padded
from vlmcap.errors import UserError
from vlmcap.files import replacing
from vlmcap.locks import process_name
from vlmcap.types import FrameTimes, GridTHW, Sample, Skipped

Encode = Callable[[Tensor, Sequence[GridTHW] | None], Tensor | Sequence[Tensor]]
"""Stacked frames, and the clips' sizes if they have their own, -> (B, F, P, Dv), or B tensors (F, P, Dv) without padding."""

SUFFIX = ".safetensors"
SCALE = ".scale"
_FORMAT = "vlmcap-features-2"
_MAX_HEADER_BYTES = 100_000_000
_ITEM_BYTES = {"F16": 2, "BF16": 2, "F32": 4, "F64": 8, "I8": 1, "U8": 1, "I32": 4, "U32": 4, "I64": 8}
_SAFE_TYPE = dict(zip(DTYPES, ("F16", "BF16", "F32", "I8"), strict=True))
_CONTENT = re.compile(r"[0-9a-f]{32}")


DAMAGED = "its cached features were damaged and have been removed; the next run encodes them again"
"""Why a clip whose entry was dropped has no features."""


class BrokenFileError(Exception):
    """Why a file is not what it should be, in words."""


class DamagedEntryError(Exception):
    """The features of a clip are not those that were written."""


@dataclass(frozen=True, slots=True)
class TensorPlace:
    """Where a tensor's bytes begin and end in its file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Header:
    """The metadata and the tensors of a safetensors file."""

    metadata: Mapping[str, str]
    tensors: Mapping[str, TensorPlace]


@dataclass(frozen=True, slots=True)
class Row:
    """A clip in a shard.

    Attributes:
        content: Hash of the clip's content.
        offset: First byte of the numbers.
        scale_offset: First byte of the scales, 0 without.
        shape: (F, P, Dv).
        grid_thw: Size in patches if the clip has its own.
        times_s: Times of the decoded frames, if they have a clock.
        checksum: As `entry_checksum` gives it.
    """

    content: str
    offset: int
    scale_offset: int
    shape: tuple[int, int, int]
    grid_thw: GridTHW | None
    checksum: int
    times_s: FrameTimes = ()


@dataclass(frozen=True, slots=True)
class Shard:
    """What a shard's header says."""

    dtype: str
    rows: tuple[Row, ...]
    skipped: Mapping[str, str]
    lost: tuple[str, ...]  # of those skipped, what may be tried again
    errors: ErrorSums


def read_header(file: BinaryIO) -> Header:
    """The header of a file whose length is what the header says.

    It is read, not mapped: an index of thousands of shards is made from the first bytes of each.

    Raises:
        BrokenFileError: It is torn, or no such file.
    """
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or not 2 <= length <= min(_MAX_HEADER_BYTES, size - 8):
        raise BrokenFileError("it is no safetensors file, or cut off in its header")
    try:
        raw = json.loads(file.read(length))
        metadata = dict(raw.pop("__metadata__", {}))
        tensors = {name: _place(8 + length, **entry) for name, entry in raw.items()}
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise BrokenFileError("its header is damaged") from error
    end = 8 + length
    for place in sorted(tensors.values(), key=lambda place: (place.start, place.stop)):
        if place.start != end or place.stop - place.start != math.prod(place.shape) * _ITEM_BYTES[place.dtype]:
            raise BrokenFileError("its header contradicts itself")
        end = place.stop
    if end != size:
        raise BrokenFileError(f"it has {size} bytes in place of {end}")
    return Header(metadata, tensors)


def _place(base: int, dtype: str, shape: list[int], data_offsets: list[int]) -> TensorPlace:
    start, stop = data_offsets
    if dtype not in _ITEM_BYTES or not all(type(number) is int and number >= 0 for number in (*shape, start, stop)):
        raise ValueError(dtype)
    return TensorPlace(dtype, tuple(shape), base + start, base + stop)


def read_shard(path: Path) -> Shard:
    """The rows of a shard.

    Raises:
        BrokenFileError: It is torn, or no shard of features.
        OSError: It cannot be opened.
    """
    with path.open("rb") as file:
        header = read_header(file)
    try:
        if header.metadata["format"] != _FORMAT:
            raise BrokenFileError("it holds no features, or those of another version")
        dtype, grids, times_s = (
            header.metadata["dtype"],
            json.loads(header.metadata["grids"]),
            json.loads(header.metadata["times_s"]),
        )
        checksums = json.loads(header.metadata["checksums"])
        names = [name for name in header.tensors if not name.endswith(SCALE)]
        rows = tuple(
            _row(name, header, dtype, grids.get(name), times_s.get(name, ()), checksums[name]) for name in names
        )
        skipped = {str(content): str(reason) for content, reason in json.loads(header.metadata["skipped"]).items()}
        lost = tuple(str(content) for content in json.loads(header.metadata["lost"]))
        return Shard(dtype, rows, skipped, lost, ErrorSums(**json.loads(header.metadata["errors"])))
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        raise BrokenFileError("its metadata are damaged") from error


def _row(name: str, header: Header, dtype: str, grid: list[int] | None, times_s: Sequence[float], checksum: int) -> Row:
    place = header.tensors[name]
    if not _CONTENT.fullmatch(name) or place.dtype != _SAFE_TYPE[dtype] or not 0 <= checksum < 2**32:
        raise ValueError(name)
    num_frames, num_patches, embed_dim = place.shape
    scale_offset = 0
    if dtype == "int8":
        scale = header.tensors[name + SCALE]
        if scale.dtype != "F32" or scale.shape != (num_frames, num_patches):
            raise ValueError(name)
        scale_offset = scale.start
    shape, grid_thw = (num_frames, num_patches, embed_dim), None
    if grid is not None:
        frames, height, width = (int(size) for size in grid)
        grid_thw = (frames, height, width)
    return Row(
        name, place.start, scale_offset, shape, grid_thw, int(checksum), tuple(float(time_s) for time_s in times_s)
    )


def entry_checksum(
    content: str, shape: Sequence[int], grid_thw: GridTHW | None, times_s: FrameTimes, parts: Iterable[Any]
) -> int:
    """CRC-32 of all that an entry says: whose it is, its sizes and times, and the bytes of its numbers and scales.

    Args:
        content: Hash of the clip's content.
        shape: (F, P, Dv).
        grid_thw: The clip's size in patches, if it has its own.
        times_s: Times of its decoded frames; empty without a clock.
        parts: Buffers of the numbers and, with int8, of the scales.
    """
    checksum = zlib.crc32(json.dumps([content, list(shape), grid_thw, list(times_s)]).encode())
    for part in parts:
        checksum = zlib.crc32(part, checksum)
    return checksum


def tensors_checksum(content: str, tensors: Mapping[str, Tensor], grid_thw: GridTHW | None, times_s: FrameTimes) -> int:
    """The same of an entry whose numbers and scales are tensors."""
    parts = [
        tensors[name].reshape(-1).view(torch.uint8).numpy() for name in (content, content + SCALE) if name in tensors
    ]
    return entry_checksum(content, tensors[content].shape, grid_thw, times_s, parts)


def write_shard(
    folder: Path,
    dtype: str,
    tensors: dict[str, Tensor],
    grids: Mapping[str, GridTHW],
    skipped: Mapping[str, Skipped],
    errors: ErrorSums,
    times_s: Mapping[str, FrameTimes] | None = None,
) -> Path:
    """A new shard in `folder`, on the disk before it bears its name.

    Times are written in full: a prompt rounds them to a tenth of a second, and must come out the same with and without
    a cache.

    Raises:
        OSError: The disk is full or the folder not writable.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    lost = [content for content, item in skipped.items() if not item.is_final]
    reasons = {content: item.reason for content, item in skipped.items()}
    names = [name for name in tensors if not name.endswith(SCALE)]
    times = times_s or {}
    checksums = {
        content: tensors_checksum(content, tensors, grids.get(content), times.get(content, ())) for content in names
    }
    plain: dict[str, Any] = {
        "grids": grids,
        "times_s": times,
        "checksums": checksums,
        "skipped": reasons,
        "lost": lost,
        "errors": asdict(errors),
    }
    metadata = {
        "format": _FORMAT,
        "dtype": dtype,
        **{name: json.dumps(value, ensure_ascii=False) for name, value in plain.items()},
    }
    path = folder / f"{time.time_ns() // 1000:016d}-{process_name()}-{secrets.token_hex(3)}{SUFFIX}"
    with replacing(path) as partial:
        try:
            save_file(tensors, partial, metadata)
        except SafetensorError as error:  # the library's own word for a failed write
            raise OSError(str(error)) from error
        with partial.open("rb") as file:
            os.fsync(file.fileno())
    sync_folder(folder)
    return path


def sync_folder(folder: Path) -> None:
    """Have the names in a folder on the disk; where a system cannot do that for folders, it is left to it."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)


@dataclass
class ShardWriter:
    """Collects features until they are a shard's worth.

    Attributes:
        folder: Of the shards.
        recipe: Says how numbers are stored.
        make_room: Called with bytes that are about to be written.
        shape: (F, P) that all clips without a size of their own have, None before the first.
        num_bytes: Collected.
        since: When the oldest of what is collected came, by the monotonic clock; None where there is nothing.
    """

    folder: Path
    recipe: Recipe
    make_room: Callable[[int], None]
    shape: tuple[int, int] | None = None
    num_bytes: int = 0
    since: float | None = None
    _tensors: dict[str, Tensor] = field(default_factory=dict)
    _grids: dict[str, GridTHW] = field(default_factory=dict)
    _times_s: dict[str, FrameTimes] = field(default_factory=dict)
    _skipped: dict[str, Skipped] = field(default_factory=dict)
    _errors: ErrorSums = field(default_factory=ErrorSums)

    def add(self, batch: list[Sample | Skipped], contents: Sequence[bytes], encode: Encode) -> list[int]:
        """Take in a batch; the bytes of each of its clips that has features.

        Args:
            batch: Samples with frames.
            contents: Content hash of each.
            encode: Gives the features.

        Raises:
            UserError: Features cannot be stored.
        """
        if batch and self.since is None:
            self.since = time.monotonic()
        named = list(zip(batch, (content.decode() for content in contents), strict=True))
        self._skipped |= {content: item for item, content in named if isinstance(item, Skipped)}
        samples = [(item, content) for item, content in named if isinstance(item, Sample)]
        frames = stack_padded([sample.frames for sample, _ in samples])
        if frames is None:
            assert not samples, "features are built from samples with frames"
            return []
        grids = [sample.grid_thw for sample, _ in samples if sample.grid_thw is not None]
        assert len(grids) in (0, len(samples)), "a batch mixes clips with a size of their own and without"
        features = encode(frames, grids or None)
        is_padded = isinstance(features, Tensor)
        return [
            self._collect(sample, content, _cut(own, sample) if is_padded else own)
            for (sample, content), own in zip(samples, features, strict=True)
        ]

    def flush(self) -> None:
        """Write what is collected as a shard.

        Raises:
            UserError: There is no room.
        """
        if self.since is None:
            return
        self.make_room(self.num_bytes)
        try:
            write_shard(
                self.folder, self.recipe.dtype, self._tensors, self._grids, self._skipped, self._errors, self._times_s
            )
        except OSError as error:
            if error.errno == errno.ENOSPC or "No space left" in str(error) or "os error 28" in str(error):
                raise UserError(
                    f"the disk of {self.folder} is full: free some space and start again, which goes on from here, or "
                    "set "
                    "cache.enabled=false"
                ) from error
            raise
        self._tensors, self._grids, self._times_s, self._skipped, self._errors = {}, {}, {}, {}, ErrorSums()
        self.num_bytes, self.since = 0, None

    def _collect(self, sample: Sample, content: str, features: Tensor) -> int:
        features = features.detach()
        stored = {content: features.to(stored_type(self.recipe.dtype))}
        read = stored[content]
        if self.recipe.dtype == "int8":
            stored[content], stored[content + SCALE] = quantize(features)
            read = dequantize(stored[content], stored[content + SCALE])
        self._check(sample, features, read)
        self._errors.add(measure(features, read))
        self._tensors |= {name: _own(tensor, features) for name, tensor in stored.items()}
        if sample.grid_thw is not None:
            self._grids[content] = sample.grid_thw
        if sample.times_s is not None:
            self._times_s[content] = sample.times_s
        num_bytes = sum(tensor.nbytes for tensor in stored.values())
        self.num_bytes += num_bytes
        return num_bytes

    def _check(self, sample: Sample, features: Tensor, read: Tensor) -> None:
        shape = (features.shape[0], features.shape[1])
        if sample.grid_thw is None:
            self.shape = self.shape or shape
            is_other = shape[1] != self.shape[1] if self.recipe.variable_frames else shape != self.shape
            if is_other:
                raise UserError(
                    f"features of clip {sample.clip.id} are {shape}, earlier ones {self.shape}, and cannot share a "
                    "cache: "
                    "set cache.enabled=false"
                )
        if not is_finite(read):
            mend = (
                f"overflow cache.dtype={self.recipe.dtype}: set cache.dtype=bfloat16"
                if is_finite(features)
                else "are not finite: the encoder overflows, choose another precision"
            )
            raise UserError(f"features of clip {sample.clip.id} {mend}")


def _cut(features: Tensor, sample: Sample) -> Tensor:
    """Without the padding that a batch of clips of different sizes has."""
    if sample.grid_thw is None:
        assert sample.frames is not None
        return features[: len(sample.frames)]
    frames, height, width = sample.grid_thw
    return features[:frames, : height * width]


def _own(tensor: Tensor, features: Tensor) -> Tensor:
    """In main memory, and not in that of the features: an encoder may give its next ones in the same place."""
    copy = tensor.cpu().contiguous()
    return copy.clone() if copy.untyped_storage().data_ptr() == features.untyped_storage().data_ptr() else copy
