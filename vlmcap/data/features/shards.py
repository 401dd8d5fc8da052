"""Shard files: safetensors with the features of some clips, each whole or not there.

Legend: F frames, P patches a frame, Dv vision width.

A tensor is named by its clip's content hash, the scales of int8 by that and `.scale`. The metadata say the rest: sizes in patches, clips
that could not be read, and the error of the stored numbers.
"""

from __future__ import annotations

import json
import math
import os
import re
import secrets
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from torch import Tensor

from vlmcap.data.features.precision import DTYPES, ErrorSums
from vlmcap.data.features.processes import process_name
from vlmcap.files import replacing
from vlmcap.types import GridTHW, Skipped

SUFFIX = ".safetensors"
SCALE = ".scale"
_FORMAT = "vlmcap-features-1"
_MAX_HEADER_BYTES = 100_000_000
_ITEM_BYTES = {"F16": 2, "BF16": 2, "F32": 4, "I8": 1, "U8": 1, "I32": 4, "I64": 8}
_SAFE_TYPE = dict(zip(DTYPES, ("F16", "BF16", "F32", "I8"), strict=True))
_CONTENT = re.compile(r"[0-9a-f]{32}")


class BrokenFileError(Exception):
    """Why a file is not what it should be, in words."""


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
    """A clip in a shard: hash, first bytes of numbers and scales (0 without), (F, P, Dv), and size in patches if it has its own."""

    content: str
    offset: int
    scale_offset: int
    shape: tuple[int, int, int]
    grid_thw: GridTHW | None


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
        dtype, grids = header.metadata["dtype"], json.loads(header.metadata["grids"])
        rows = tuple(_row(name, header, dtype, grids.get(name)) for name in header.tensors if not name.endswith(SCALE))
        skipped = {str(content): str(reason) for content, reason in json.loads(header.metadata["skipped"]).items()}
        lost = tuple(str(content) for content in json.loads(header.metadata["lost"]))
        return Shard(dtype, rows, skipped, lost, ErrorSums(**json.loads(header.metadata["errors"])))
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        raise BrokenFileError("its metadata are damaged") from error


def _row(name: str, header: Header, dtype: str, grid: list[int] | None) -> Row:
    place = header.tensors[name]
    if not _CONTENT.fullmatch(name) or place.dtype != _SAFE_TYPE[dtype]:
        raise ValueError(name)
    num_frames, num_patches, embed_dim = place.shape
    scale_offset = 0
    if dtype == "int8":
        scale = header.tensors[name + SCALE]
        if scale.dtype != "F32" or scale.shape != (num_frames, num_patches):
            raise ValueError(name)
        scale_offset = scale.start
    if grid is None:
        return Row(name, place.start, scale_offset, (num_frames, num_patches, embed_dim), None)
    frames, height, width = (int(size) for size in grid)
    return Row(name, place.start, scale_offset, (num_frames, num_patches, embed_dim), (frames, height, width))


def write_shard(
    folder: Path, dtype: str, tensors: dict[str, Tensor], grids: Mapping[str, GridTHW], skipped: Mapping[str, Skipped], errors: ErrorSums
) -> Path:
    """A new shard in `folder`, on the disk before it bears its name.

    Raises:
        OSError: The disk is full or the folder not writable.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    lost = [content for content, item in skipped.items() if not item.is_final]
    reasons = {content: item.reason for content, item in skipped.items()}
    plain: dict[str, Any] = {"grids": grids, "skipped": reasons, "lost": lost, "errors": asdict(errors)}
    metadata = {"format": _FORMAT, "dtype": dtype, **{name: json.dumps(value, ensure_ascii=False) for name, value in plain.items()}}
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
