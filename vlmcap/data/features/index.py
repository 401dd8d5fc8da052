"""Index of a store: sorted arrays over the clips of all its shards, in a file that every process maps.

Legend: N clips, F frames, P patches per frame, Dv vision width.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from vlmcap.data.features.precision import ErrorSums
from vlmcap.data.features.shards import SUFFIX, BrokenFileError, Header, Shard, read_header, read_shard
from vlmcap.files import replacing

FILE = "index.safetensors"
_FORMAT = "vlmcap-feature-index-2"
_COLUMNS = 7


@dataclass(frozen=True, slots=True)
class ShardFile:
    """A shard in the index; if its size or modification time differs, so does its content."""

    name: str
    size: int
    mtime_ns: int
    dtype: str
    skipped: Mapping[str, str]
    lost: tuple[str, ...]
    errors: ErrorSums


@dataclass(frozen=True)
class ShardIndex:
    """Clips by content hash; if it was saved, it is mapped from the file, so that processes share its memory.

    A clip takes 68 bytes plus 8 for each of its frames.

    Attributes:
        files: Shards, in the order of their numbers.
        hashes: S32 (N,), sorted, without duplicates.
        offsets: int64 (N, 2); first byte of the numbers, and of the scales or 0.
        layouts: int32 (N, 7); number of the shard, F, P, Dv, and the clip's size in patches or zeros.
        checksums: uint32 (N,), from `entry_checksum`.
        times_s: float64 (N, largest number of decoded frames); display times, padded with NaN.
    """

    files: tuple[ShardFile, ...] = ()
    hashes: NDArray[np.bytes_] = field(default_factory=lambda: np.empty(0, "S32"))
    offsets: NDArray[np.int64] = field(default_factory=lambda: np.empty((0, 2), np.int64))
    layouts: NDArray[np.int32] = field(default_factory=lambda: np.empty((0, _COLUMNS), np.int32))
    checksums: NDArray[np.uint32] = field(default_factory=lambda: np.empty(0, np.uint32))
    times_s: NDArray[np.float64] = field(default_factory=lambda: np.empty((0, 0), np.float64))

    def find(self, content: bytes) -> int | None:
        """Returns the row of a clip, or None."""
        # `hashes` is sorted.
        row = int(np.searchsorted(self.hashes, np.asarray(content, "S32")))
        return row if row < len(self.hashes) and self.hashes[row] == content else None

    def skipped(self) -> dict[bytes, str]:
        """Returns content hash to reason for the clips that could not be read."""
        return {content.encode(): reason for file in self.files for content, reason in file.skipped.items()}

    def lost(self) -> set[bytes]:
        """Returns the hashes of skipped clips that may be retried, which no shard reports as broken for good."""
        known = [(file.skipped.keys(), set(file.lost)) for file in self.files]
        final = {content for skipped, lost in known for content in skipped - lost}
        return {content.encode() for _, lost in known for content in lost - final}

    def without(self, gone: set[str]) -> ShardIndex:
        """Returns the index without some shards."""
        kept = [number for number, file in enumerate(self.files) if file.name not in gone]
        numbers = np.full(len(self.files), -1, np.int32)  # old number of a shard -> new number; -1 if it is gone
        numbers[kept] = np.arange(len(kept), dtype=np.int32)
        layouts = self.layouts.copy()
        layouts[:, 0] = numbers[layouts[:, 0]]
        mask = layouts[:, 0] >= 0
        files = tuple(self.files[number] for number in kept)
        return ShardIndex(
            files, self.hashes[mask], self.offsets[mask], layouts[mask], self.checksums[mask], self.times_s[mask]
        )

    def with_shards(self, shards: Iterable[tuple[ShardFile, Shard]]) -> ShardIndex:
        """Returns the index with more shards; a clip that is in several of them keeps its first place."""
        # 1. Collect the entries of the new shards.
        files, hashes, offsets, layouts, checksums, times_s = list(self.files), [], [], [], [], []
        for file, shard in shards:
            for entry in shard.entries:
                hashes.append(entry.content)
                offsets.append((entry.offset, entry.scale_offset))
                layouts.append((len(files), *entry.shape, *(entry.grid_thw or (0, 0, 0))))
                checksums.append(entry.checksum)
                times_s.append(entry.times_s)
            files.append(file)
        # 2. Sort them by hash, without repeats and without clips that the index has.
        names, first = np.unique(np.array(hashes, "S32"), return_index=True)
        fresh = ~contains(self.hashes, names)
        names, first = names[fresh], first[fresh]
        # 3. Pad the times of all clips to the largest number of frames, and insert the entries in order.
        at = np.searchsorted(self.hashes, names)
        width = max([self.times_s.shape[1], *map(len, times_s)])
        wide = np.pad(self.times_s, ((0, 0), (0, width - self.times_s.shape[1])), constant_values=np.nan)
        padded = [times + (np.nan,) * (width - len(times)) for times in times_s]
        return ShardIndex(
            tuple(files),
            np.insert(self.hashes, at, names),
            np.insert(self.offsets, at, np.array(offsets, np.int64).reshape(-1, 2)[first], axis=0),
            np.insert(self.layouts, at, np.array(layouts, np.int32).reshape(-1, _COLUMNS)[first], axis=0),
            np.insert(self.checksums, at, np.array(checksums, np.uint32)[first]),
            np.insert(wide, at, np.array(padded, np.float64).reshape(len(padded), width)[first], axis=0),
        )


def contains(ordered: NDArray[np.bytes_], hashes: NDArray[np.bytes_]) -> NDArray[np.bool_]:
    """Returns which of `hashes` are in the sorted array."""
    if not len(ordered):
        return np.zeros(len(hashes), bool)
    rows = np.minimum(np.searchsorted(ordered, hashes), len(ordered) - 1)
    is_present: NDArray[np.bool_] = ordered[rows] == hashes
    return is_present


def update(index: ShardIndex, folder: Path, broken: dict[str, str], dtype: str | None = None) -> ShardIndex:
    """Updates an index to the current content of the folder; only headers of new shards are read.

    The same object is returned if nothing changed.

    Args:
        index: Index so far.
        folder: Folder of the shards.
        broken: Shard name to reason for shards that are left out; updated in place.
        dtype: Type that the shards must have.
    """
    # 1. Forget shards that were removed or replaced.
    present = _list(folder)
    known = {file.name: (file.size, file.mtime_ns) for file in index.files}
    gone = {name for name, stat in known.items() if present.get(name) != stat}
    for name in broken.keys() - present.keys():
        del broken[name]
    # 2. Read the headers of new shards.
    new = []
    # New shards: present, not known or changed, and not broken.
    for name in sorted(present.keys() - (known.keys() - gone) - broken.keys()):
        try:
            shard = read_shard(folder / name)
            if dtype not in (None, shard.dtype):
                raise BrokenFileError(f"it contains {shard.dtype} instead of {dtype}")
        except BrokenFileError as error:
            broken[name] = str(error)
        except FileNotFoundError:  # evicted since the folder was listed
            continue
        else:
            new.append((ShardFile(name, *present[name], shard.dtype, shard.skipped, shard.lost, shard.errors), shard))
    index = index.without(gone) if gone else index
    return index.with_shards(new) if new else index


def _list(folder: Path) -> dict[str, tuple[int, int]]:
    """Returns shard name to size and modification time."""
    present = {}
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.endswith(SUFFIX) and not entry.name.startswith(".") and entry.name != FILE:
                    try:
                        stat = entry.stat()
                    except FileNotFoundError:
                        continue
                    present[entry.name] = (stat.st_size, stat.st_mtime_ns)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    return present


def save(index: ShardIndex, folder: Path) -> None:
    """Writes the index next to its shards; it only saves time, so an unwritable folder is not an error."""
    from safetensors.numpy import save_file

    tensors: dict[str, NDArray[Any]] = {"hashes": index.hashes.view(np.uint8).reshape(-1, 32), "offsets": index.offsets}
    tensors |= {"layouts": index.layouts, "checksums": index.checksums.reshape(-1, 1), "times_s": index.times_s}
    files = json.dumps([asdict(file) for file in index.files], ensure_ascii=False)
    metadata = {"format": _FORMAT, "files": files, "checksum": str(_checksum(files, index))}
    try:
        with replacing(folder / FILE) as partial:
            save_file({name: np.ascontiguousarray(values) for name, values in tensors.items()}, partial, metadata)
            with partial.open("rb") as file:
                os.fsync(file.fileno())
    except Exception:  # the library has its own exceptions
        return


def load(folder: Path) -> ShardIndex:
    """Maps the index that was saved last; an empty one if there is none, or it is damaged."""
    return _load(folder) or ShardIndex()


def is_intact(folder: Path) -> bool:
    """Returns whether the saved index is undamaged and its entries are in the shards at the stated positions.

    Only this check finds shards that were exchanged at equal size and time: the index compares size and time, and each
    shard by itself is valid.
    """
    index = _load(folder)
    if index is None:
        return False
    index = update(index, folder, {})
    try:
        held = {
            (file.name, entry.content): (entry.offset, entry.checksum)
            for file in index.files
            for entry in read_shard(folder / file.name).entries
        }
    except (BrokenFileError, OSError):
        return False
    # A layout begins with the number of its shard.
    return all(
        held.get((index.files[layout[0]].name, content.decode())) == (offset, checksum)
        for content, offset, layout, checksum in zip(
            index.hashes, index.offsets[:, 0].tolist(), index.layouts.tolist(), index.checksums.tolist(), strict=True
        )
    )


def _load(folder: Path) -> ShardIndex | None:
    try:
        with (folder / FILE).open("rb") as file:
            header = read_header(file)
            if header.metadata["format"] != _FORMAT:
                return None
            entries = json.loads(header.metadata["files"])
            files = tuple(
                ShardFile(**entry | {"lost": tuple(entry["lost"]), "errors": ErrorSums(**entry["errors"])})
                for entry in entries
            )
            hashes = _mapped(file, header, "hashes", np.uint8, 32).reshape(-1).view("S32")
            offsets = _mapped(file, header, "offsets", np.int64, 2)
            layouts = _mapped(file, header, "layouts", np.int32, _COLUMNS)
            checksums = _mapped(file, header, "checksums", np.uint32, 1).reshape(-1)
            times_s = _mapped(file, header, "times_s", np.float64, header.tensors["times_s"].shape[1])
        index = ShardIndex(files, hashes, offsets, layouts, checksums, times_s)
        # A file that was cut off or changed has another checksum, and is made again.
        return index if header.metadata["checksum"] == str(_checksum(header.metadata["files"], index)) else None
    # Whatever is wrong: the index only repeats what the shards hold.
    except (OSError, BrokenFileError, ValueError, TypeError, KeyError, AttributeError):
        return None


def _checksum(files: str, index: ShardIndex) -> int:
    """Returns the CRC-32 of an index; an index whose checksum differs is rebuilt from the shards."""
    checksum = zlib.crc32(files.encode("utf-8", "surrogatepass"))
    for values in (index.hashes.view(np.uint8), index.offsets, index.layouts, index.checksums, index.times_s):
        checksum = zlib.crc32(np.ascontiguousarray(values).data.cast("B") if values.size else b"", checksum)
    return checksum


def _mapped(file: BinaryIO, header: Header, name: str, dtype: type[Any], columns: int) -> NDArray[Any]:
    """Maps an array from the open file, not from its name, which another process may have given to a newer index."""
    tensor = header.tensors[name]
    if tensor.stop == tensor.start:
        return np.empty((tensor.shape[0], columns), dtype)
    return np.memmap(file, dtype, "r", tensor.start, (tensor.shape[0], columns))
