"""Shard files: safetensors with the features of some clips, each whole or not there.

Legend: F frames, P patches a frame, Dv vision width.

A tensor is named by its clip's content hash, the scales of int8 by that and `.scale`. The metadata say the rest: sizes in patches, a
checksum of each clip's entry, clips that could not be read, and the error of the stored numbers.
"""

from __future__ import annotations

import json
import math
import os
import re
import secrets
import time
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from vlmcap.data.features.claims import process_name
from vlmcap.data.features.precision import DTYPES, ErrorSums
from vlmcap.files import replacing
from vlmcap.types import Clip, GridTHW, Skipped

SUFFIX = ".safetensors"
SCALE = ".scale"
_FORMAT = "vlmcap-features-2"
_MAX_HEADER_BYTES = 100_000_000
_ITEM_BYTES = {"F16": 2, "BF16": 2, "F32": 4, "I8": 1, "U8": 1, "I32": 4, "U32": 4, "I64": 8}
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
        checksum: As `entry_checksum` gives it.
    """

    content: str
    offset: int
    scale_offset: int
    shape: tuple[int, int, int]
    grid_thw: GridTHW | None
    checksum: int


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
        dtype, grids, checksums = header.metadata["dtype"], json.loads(header.metadata["grids"]), json.loads(header.metadata["checksums"])
        names = [name for name in header.tensors if not name.endswith(SCALE)]
        rows = tuple(_row(name, header, dtype, grids.get(name), checksums[name]) for name in names)
        skipped = {str(content): str(reason) for content, reason in json.loads(header.metadata["skipped"]).items()}
        lost = tuple(str(content) for content in json.loads(header.metadata["lost"]))
        return Shard(dtype, rows, skipped, lost, ErrorSums(**json.loads(header.metadata["errors"])))
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        raise BrokenFileError("its metadata are damaged") from error


def _row(name: str, header: Header, dtype: str, grid: list[int] | None, checksum: int) -> Row:
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
    return Row(name, place.start, scale_offset, shape, grid_thw, int(checksum))


def entry_checksum(content: str, shape: Sequence[int], grid_thw: GridTHW | None, parts: Iterable[Any]) -> int:
    """CRC-32 of all that an entry says: whose it is, its sizes, and the bytes of its numbers and scales.

    Args:
        content: Hash of the clip's content.
        shape: (F, P, Dv).
        grid_thw: The clip's size in patches, if it has its own.
        parts: Buffers of the numbers and, with int8, of the scales.
    """
    checksum = zlib.crc32(json.dumps([content, list(shape), grid_thw]).encode())
    for part in parts:
        checksum = zlib.crc32(part, checksum)
    return checksum


def _tensors_checksum(content: str, tensors: Mapping[str, Tensor], grid_thw: GridTHW | None) -> int:
    parts = [tensors[name].reshape(-1).view(torch.uint8).numpy() for name in (content, content + SCALE) if name in tensors]
    return entry_checksum(content, tensors[content].shape, grid_thw, parts)


def damaged_entries(path: Path) -> list[str]:
    """Content hashes of the clips of a shard whose entries are damaged.

    Raises:
        BrokenFileError: Nothing of it can be read.
        OSError: It cannot be opened.
    """
    return _find_damage(path)[2]


def _find_damage(path: Path) -> tuple[Shard, dict[str, Tensor], list[str]]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    shard = read_shard(path)
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise BrokenFileError(str(error)) from error
    return shard, tensors, [row.content for row in shard.rows if _tensors_checksum(row.content, tensors, row.grid_thw) != row.checksum]


def repair_shard(path: Path) -> None:
    """Write the sound entries of a shard to a new one, which says of the damaged ones that they may be tried again; the old one goes.

    Raises:
        BrokenFileError: Nothing of it can be read; it stays.
        OSError: It cannot be opened, or the new one cannot be written.
    """
    shard, tensors, damaged = _find_damage(path)
    if not damaged:
        return
    sound = {name: tensor for name, tensor in tensors.items() if name.removesuffix(SCALE) not in damaged}
    grids = {row.content: row.grid_thw for row in shard.rows if row.grid_thw is not None and row.content in sound}
    skipped = {content: Skipped(Clip("", "", ()), reason, content not in shard.lost) for content, reason in shard.skipped.items()}
    skipped |= {content: Skipped(Clip("", "", ()), DAMAGED, is_final=False) for content in damaged}
    write_shard(path.parent, shard.dtype, sound, grids, skipped, shard.errors)
    path.unlink(missing_ok=True)


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
    names = [name for name in tensors if not name.endswith(SCALE)]
    checksums = {content: _tensors_checksum(content, tensors, grids.get(content)) for content in names}
    plain: dict[str, Any] = {"grids": grids, "checksums": checksums, "skipped": reasons, "lost": lost, "errors": asdict(errors)}
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
