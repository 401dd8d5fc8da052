"""Content hashes of clips, cached so that each file is read for its hash only one time."""

from __future__ import annotations

import contextlib
import hashlib
import os
import sqlite3
import warnings
import zlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vlmcap.data.media import MediaError, MediaStat, local_path, open_media, stat_media
from vlmcap.types import Clip

UNREADABLE = b"0" * 32
"""Content hash of a clip whose file cannot be opened; no features are ever stored for it."""

_BLOCK = 64 * 1024
_NUM_BLOCKS = 16
_NUM_THREADS = 8
_BATCH_SIZE = 1024  # clips per query of the cache
_LOCK_TIMEOUT_S = 30.0
_HashRecord = tuple[int, str, str]  # size, version, hash

_TABLE = (
    "CREATE TABLE IF NOT EXISTS hashes "
    "(address TEXT PRIMARY KEY, size INTEGER, version TEXT, hash TEXT, checksum INTEGER) WITHOUT ROWID"
)
_DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


def content_hashes(
    clips: Sequence[Clip], hash_file: Path, progress: Callable[[int, int], None] | None = None
) -> NDArray[np.bytes_]:
    """Returns 32 hexadecimal digits for the media of each clip, S32 (N,); zeros where a file cannot be read.

    Captions have no influence.

    Args:
        clips: N clips; the hash of a clip of several images is the hash of their hashes.
        hash_file: SQLite file that caches hashes by address, size and version; processes may share it. If it cannot be
            used, all files are read again, which only costs time.
        progress: Callback `(done, N)` on clips.
    """
    hashes = np.full(len(clips), UNREADABLE, "S32")
    with _HashCache(hash_file) as known, ThreadPoolExecutor(_NUM_THREADS) as pool:
        for start in range(0, len(clips), _BATCH_SIZE):
            block = [clips[position] for position in range(start, min(start + _BATCH_SIZE, len(clips)))]
            now = _file_hashes(block, known, pool)
            for position, clip in enumerate(block, start):
                hashes[position] = _clip_hash(clip, now)
            if progress is not None:
                progress(start + len(block), len(clips))
    return hashes


def media_hash(address: str, stat: MediaStat) -> str:
    """Returns 32 hexadecimal digits for the content of a file.

    Files up to 1 MiB are hashed completely. For larger ones the hash covers the size and 16 evenly spread blocks of
    64 KiB, the first and last among them: that reads 1 MiB per clip instead of everything, and the table of sample
    sizes at one end of an MP4 changes with any new encoding. A byte changed in place between the blocks goes unnoticed.

    Raises:
        MediaError: The file cannot be read.
    """
    size = stat.size
    digest = hashlib.sha256(f"{size}:".encode())
    with open_media(address) as file:
        # Up to 1 MiB a file is hashed whole, beyond that by 16 blocks of 64 KiB.
        if size <= _BLOCK * _NUM_BLOCKS:
            digest.update(file.read())
        else:
            for i in range(_NUM_BLOCKS):
                # The last block ends at the end of the file.
                file.seek((size - _BLOCK) * i // (_NUM_BLOCKS - 1))
                digest.update(file.read(_BLOCK))
    return digest.hexdigest()[:32]


def _file_hashes(clips: Sequence[Clip], cache: _HashCache, pool: ThreadPoolExecutor) -> dict[str, _HashRecord | None]:
    """Returns a record for the address of each file of some clips, and caches the new ones."""
    addresses = list(dict.fromkeys(address for clip in clips for address in clip.frames or (clip.video,)))
    names = [_absolute_address(address) for address in addresses]
    cached = cache.find(names)
    before = [cached.get(name) for name in names]
    # Files whose size and version are those in the cache are not read.
    now = list(pool.map(_hash_file, addresses, before))
    cache.add(
        [(name, *new) for name, old, new in zip(names, before, now, strict=True) if new is not None and new != old]
    )
    return dict(zip(addresses, now, strict=True))


def _clip_hash(clip: Clip, known: dict[str, _HashRecord | None]) -> bytes:
    if not clip.frames:
        entry = known[clip.video]
        return entry[2].encode() if entry else UNREADABLE
    entries = [known[address] for address in clip.frames]
    digests = [entry[2] for entry in entries if entry]
    if len(digests) < len(entries):
        return UNREADABLE
    # The prefix keeps a list of one image apart from that image.
    return hashlib.sha256(("frames:" + ",".join(digests)).encode()).hexdigest()[:32].encode()


def _absolute_address(address: str) -> str:
    """Returns an address that does not depend on the working directory."""
    try:
        path = local_path(address)
    except MediaError:
        return address
    return address if path is None else os.path.abspath(path)


def _hash_file(address: str, before: _HashRecord | None) -> _HashRecord | None:
    """Returns size, version and hash of a file; None if it cannot be read."""
    try:
        stat = stat_media(address)
        if before is not None and before[:2] == (stat.size, stat.version):
            return before
        return stat.size, stat.version, media_hash(address, stat)
    except (MediaError, OSError):
        return None


class _HashCache:
    """The hashes of earlier calls; empty, with one warning, if the file cannot be used.

    A damaged file is replaced, and a damaged row is ignored.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._connection: sqlite3.Connection | None = None
        self._was_replaced = False

    def __enter__(self) -> _HashCache:
        self._connect()
        return self

    def _connect(self) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._connection = sqlite3.connect(self.path, timeout=_LOCK_TIMEOUT_S)
            self._connection.text_factory = lambda text: text.decode(errors="replace")
            self._connection.execute(_TABLE)
        except (OSError, sqlite3.Error) as error:
            self._reset(error)

    def __exit__(self, *_: object) -> None:
        if self._connection is not None:
            self._connection.close()

    def find(self, addresses: Iterable[str]) -> dict[str, _HashRecord]:
        """Returns the cached records of some files."""
        records: dict[str, _HashRecord] = {}
        names = list(addresses)
        for start in range(0, len(names), 500):  # SQLite limits the number of values in a statement
            if self._connection is None:
                break
            chunk = names[start : start + 500]
            marks = ",".join("?" * len(chunk))
            query = f"SELECT address, size, version, hash, checksum FROM hashes WHERE address IN ({marks})"
            try:
                rows = self._connection.execute(query, chunk).fetchall()
                records |= {
                    address: tuple(known)
                    for address, *known, checksum in rows
                    if checksum == _checksum(address, *known)
                }
            except sqlite3.Error as error:
                self._reset(error)
        return records

    def add(self, rows: Sequence[tuple[str, int, str, str]]) -> None:
        """Caches the records of some files."""
        if self._connection is None or not rows:
            return
        try:
            with self._connection:
                self._connection.executemany(
                    "INSERT OR REPLACE INTO hashes VALUES (?, ?, ?, ?, ?)", [(*row, _checksum(*row)) for row in rows]
                )
        except sqlite3.Error as error:
            self._reset(error)

    def _reset(self, error: Exception) -> None:
        """Replaces the file if it is damaged; for other errors go on without a cache."""
        if self._connection is not None:
            self._connection.close()
        self._connection = None
        # The low byte of an extended error code is the primary one.
        if getattr(error, "sqlite_errorcode", 0) & 0xFF in _DAMAGED and not self._was_replaced:
            self._was_replaced = True
            for suffix in ("", "-journal", "-wal", "-shm"):
                with contextlib.suppress(OSError):
                    self.path.with_name(f"{self.path.name}{suffix}").unlink()
            self._connect()
            return
        warnings.warn(
            f"{self.path} cannot be used ({error}), so all videos are read for their hashes each time; "
            "check the file and its folder",
            stacklevel=4,
        )


def _checksum(*row: object) -> int:
    return zlib.crc32(repr(row).encode("utf-8", "surrogatepass"))
