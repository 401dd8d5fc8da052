"""Shard files: safetensors with the features of some clips; a file is complete or does not exist.

Legend: F frames, P patches per frame, Dv vision width.

A tensor is named by its clip's content hash, the scales of int8 by that and `.scale`. The metadata contain the rest:
sizes in patches, times of frames, a checksum of each clip's entry, clips that could not be read, and the error of the
stored numbers.
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
"""Stacked frames, and the clips' sizes if they have their own -> (B, F, P, Dv), or B unpadded tensors (F, P, Dv)."""

SUFFIX = ".safetensors"
SCALE = ".scale"
_FORMAT = "vlmcap-features-2"
_MAX_HEADER_BYTES = 100_000_000
_ITEM_BYTES = {"F16": 2, "BF16": 2, "F32": 4, "F64": 8, "I8": 1, "U8": 1, "I32": 4, "U32": 4, "I64": 8}
_SAFE_TYPE = dict(zip(DTYPES, ("F16", "BF16", "F32", "I8"), strict=True))
_CONTENT = re.compile(r"[0-9a-f]{32}")


DAMAGED = "its cached features were damaged and have been removed; the next run encodes them again"
"""Reason why a clip whose entry was dropped has no features."""


class BrokenFileError(Exception):
    """The reason why a file is not a valid shard or index."""


class DamagedEntryError(Exception):
    """The features of a clip differ from those that were written."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Type, shape and bytes of a tensor in its file, from byte `start` to `stop`."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Header:
    """Metadata and tensors of a safetensors file."""

    metadata: Mapping[str, str]
    tensors: Mapping[str, TensorInfo]


@dataclass(frozen=True, slots=True)
class Entry:
    """Where the features of a clip are in a shard.

    Attributes:
        content: Hash of the clip's content.
        offset: First byte of the numbers.
        scale_offset: First byte of the scales; 0 if there are none.
        shape: (F, P, Dv).
        grid_thw: Size in patches if the clip has its own.
        times_s: Times of the decoded frames, if they have a clock.
        checksum: Checksum from `entry_checksum`.
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
    """The content of a shard's header."""

    dtype: str
    entries: tuple[Entry, ...]
    skipped: Mapping[str, str]
    lost: tuple[str, ...]  # the skipped clips that may be retried
    errors: ErrorSums


def read_header(file: BinaryIO) -> Header:
    """Reads the header of a file and checks the file's length against it.

    It is read and not mapped, as an index of thousands of shards is built from the first bytes of each.

    Raises:
        BrokenFileError: The file is truncated, or not a safetensors file.
    """
    size = os.fstat(file.fileno()).st_size
    # A safetensors file: 8 bytes with the header's length, the header as JSON, the bytes of all tensors.
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or not 2 <= length <= min(_MAX_HEADER_BYTES, size - 8):
        raise BrokenFileError("it is not a safetensors file, or is truncated in its header")
    try:
        raw = json.loads(file.read(length))
        metadata = dict(raw.pop("__metadata__", {}))
        tensors = {name: _tensor_info(8 + length, **entry) for name, entry in raw.items()}
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise BrokenFileError("its header is damaged") from error
    # The tensors must fill the file without gaps and overlaps, so a truncated file is noticed here.
    end = 8 + length
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.start, tensor.stop)):
        if tensor.start != end or tensor.stop - tensor.start != math.prod(tensor.shape) * _ITEM_BYTES[tensor.dtype]:
            raise BrokenFileError("its header contradicts itself")
        end = tensor.stop
    if end != size:
        raise BrokenFileError(f"it has {size} bytes instead of {end}")
    return Header(metadata, tensors)


def _tensor_info(base: int, dtype: str, shape: list[int], data_offsets: list[int]) -> TensorInfo:
    start, stop = data_offsets
    if dtype not in _ITEM_BYTES or not all(type(number) is int and number >= 0 for number in (*shape, start, stop)):
        raise ValueError(dtype)
    return TensorInfo(dtype, tuple(shape), base + start, base + stop)


def read_shard(path: Path) -> Shard:
    """Reads the entries of a shard.

    Raises:
        BrokenFileError: The file is truncated, or not a shard of features.
        OSError: The file cannot be opened.
    """
    with path.open("rb") as file:
        header = read_header(file)
    try:
        if header.metadata["format"] != _FORMAT:
            raise BrokenFileError("it contains no features, or those of another version")
        dtype = header.metadata["dtype"]
        grids, times_s = json.loads(header.metadata["grids"]), json.loads(header.metadata["times_s"])
        checksums = json.loads(header.metadata["checksums"])
        # A tensor has the content hash of its clip as its name; scales have it with a suffix.
        names = [name for name in header.tensors if not name.endswith(SCALE)]
        entries = tuple(
            _entry(name, header, dtype, grids.get(name), times_s.get(name, ()), checksums[name]) for name in names
        )
        skipped = {str(content): str(reason) for content, reason in json.loads(header.metadata["skipped"]).items()}
        lost = tuple(str(content) for content in json.loads(header.metadata["lost"]))
        return Shard(dtype, entries, skipped, lost, ErrorSums(**json.loads(header.metadata["errors"])))
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        raise BrokenFileError("its metadata is damaged") from error


def _entry(
    name: str, header: Header, dtype: str, grid: list[int] | None, times_s: Sequence[float], checksum: int
) -> Entry:
    place = header.tensors[name]
    if not _CONTENT.fullmatch(name) or place.dtype != _SAFE_TYPE[dtype] or not 0 <= checksum < 2**32:
        raise ValueError(name)
    num_frames, num_patches, embed_dim = place.shape  # (F, P, Dv)
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
    return Entry(
        name, place.start, scale_offset, shape, grid_thw, int(checksum), tuple(float(time_s) for time_s in times_s)
    )


def entry_checksum(
    content: str, shape: Sequence[int], grid_thw: GridTHW | None, times_s: FrameTimes, buffers: Iterable[Any]
) -> int:
    """Returns the CRC-32 of an entry: its clip, sizes and times, and the bytes of its numbers and scales.

    Args:
        content: Hash of the clip's content.
        shape: (F, P, Dv).
        grid_thw: The clip's size in patches, if it has its own.
        times_s: Times of its decoded frames; empty without a clock.
        buffers: Buffers of the numbers and, for int8, of the scales.
    """
    checksum = zlib.crc32(json.dumps([content, list(shape), grid_thw, list(times_s)]).encode())
    for buffer in buffers:
        checksum = zlib.crc32(buffer, checksum)
    return checksum


def tensors_checksum(content: str, tensors: Mapping[str, Tensor], grid_thw: GridTHW | None, times_s: FrameTimes) -> int:
    """Returns the `entry_checksum` of an entry whose numbers and scales are tensors."""
    buffers = [
        tensors[name].reshape(-1).view(torch.uint8).numpy() for name in (content, content + SCALE) if name in tensors
    ]
    return entry_checksum(content, tensors[content].shape, grid_thw, times_s, buffers)


def write_shard(
    folder: Path,
    dtype: str,
    tensors: dict[str, Tensor],
    grids: Mapping[str, GridTHW],
    skipped: Mapping[str, Skipped],
    errors: ErrorSums,
    times_s: Mapping[str, FrameTimes] | None = None,
) -> Path:
    """Writes a new shard into `folder`; its data is on the disk before it gets its name.

    Times are written in full precision: a prompt rounds them to a tenth of a second, and must be the same with and
    without a store.

    Raises:
        OSError: The disk is full or the folder is not writable.
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
    # Metadata of safetensors is text only, so everything is JSON in a string.
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
    # Names sort by time, and processes of several machines may write to one folder.
    path = folder / f"{time.time_ns() // 1000:016d}-{process_name()}-{secrets.token_hex(3)}{SUFFIX}"
    with replacing(path) as partial:
        try:
            save_file(tensors, partial, metadata)
        except SafetensorError as error:  # the library's exception for a failed write
            raise OSError(str(error)) from error
        with partial.open("rb") as file:
            os.fsync(file.fileno())
    sync_folder(folder)
    return path


def sync_folder(folder: Path) -> None:
    """Flushes the names in a folder to the disk, on systems that can do so for folders."""
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
    """Collects features until they fill a shard.

    Attributes:
        folder: Folder of the shards.
        recipe: Recipe of the features, which determines the number format.
        make_room: Callback that gets the number of bytes about to be written.
        shape: (F, P) of all clips without a size of their own; None before the first.
        num_bytes: Number of bytes collected.
        since: Time of the oldest collected features by the monotonic clock; None if there are none.
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
        """Encodes and collects a batch; returns the number of bytes of each clip that has features.

        Args:
            batch: Samples with frames.
            contents: Content hash of each sample.
            encode: Function from frames to features.

        Raises:
            UserError: Features cannot be stored.
        """
        if batch and self.since is None:
            self.since = time.monotonic()
        # 1. Separate the clips that could not be decoded.
        named = list(zip(batch, (content.decode() for content in contents), strict=True))
        self._skipped |= {content: item for item, content in named if isinstance(item, Skipped)}
        samples = [(item, content) for item, content in named if isinstance(item, Sample)]
        frames = stack_padded([sample.frames for sample, _ in samples])
        if frames is None:
            assert not samples, "features are encoded from samples with frames"
            return []
        # 2. Encode the others together, and collect the features of each clip without the padding of the batch.
        grids = [sample.grid_thw for sample, _ in samples if sample.grid_thw is not None]
        assert len(grids) in (0, len(samples)), "a batch mixes clips with and without a size in patches"
        features = encode(frames, grids or None)
        is_padded = isinstance(features, Tensor)
        return [
            self._collect(sample, content, _remove_padding(clip_features, sample) if is_padded else clip_features)
            for (sample, content), clip_features in zip(samples, features, strict=True)
        ]

    def flush(self) -> None:
        """Writes the collected features as a shard.

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
                    f"the disk of {self.folder} is full; free some space and start again, which continues from here, "
                    "or set cache.enabled=false"
                ) from error
            raise
        # Only after the shard is on the disk.
        self._tensors, self._grids, self._times_s, self._skipped, self._errors = {}, {}, {}, {}, ErrorSums()
        self.num_bytes, self.since = 0, None

    def _collect(self, sample: Sample, content: str, features: Tensor) -> int:
        features = features.detach()
        stored = {content: features.to(stored_type(self.recipe.dtype))}
        read = stored[content]
        if self.recipe.dtype == "int8":
            stored[content], stored[content + SCALE] = quantize(features)
            read = dequantize(stored[content], stored[content + SCALE])  # what training will read
        self._check(sample, features, read)
        self._errors.add(measure(features, read))
        self._tensors |= {name: _to_own_memory(tensor, features) for name, tensor in stored.items()}
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
                    f"features of clip {sample.clip.id} have shape {shape}, but earlier ones {self.shape}, and cannot "
                    "share a store; set cache.enabled=false"
                )
        if not is_finite(read):
            problem = (
                f"overflow cache.dtype={self.recipe.dtype}; set cache.dtype=bfloat16"
                if is_finite(features)
                else "are not finite, because the encoder overflows; choose another hardware.precision"
            )
            raise UserError(f"features of clip {sample.clip.id} {problem}")


def _remove_padding(features: Tensor, sample: Sample) -> Tensor:
    """Returns the features of a clip without the padding of a batch of clips of different sizes."""
    if sample.grid_thw is None:
        assert sample.frames is not None
        return features[: len(sample.frames)]
    frames, height, width = sample.grid_thw
    return features[:frames, : height * width]


def _to_own_memory(tensor: Tensor, features: Tensor) -> Tensor:
    """Copies to main memory that is not shared with the features, which an encoder may overwrite."""
    copy = tensor.cpu().contiguous()
    return copy.clone() if copy.untyped_storage().data_ptr() == features.untyped_storage().data_ptr() else copy
