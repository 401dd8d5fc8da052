"""Content hashes of clips, remembered so that a file is read for its hash once."""

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
"""Content hash of a clip whose file cannot be opened: nothing is ever remembered of it."""

_BLOCK = 64 * 1024
_NUM_BLOCKS = 16
_NUM_THREADS = 8
_AT_ONCE = 1024
_LOCK_TIMEOUT_S = 30.0
_Known = tuple[int, str, str]  # size, version, hash

_TABLE = "CREATE TABLE IF NOT EXISTS hashes (address TEXT PRIMARY KEY, size INTEGER, version TEXT, hash TEXT, checksum INTEGER) WITHOUT ROWID"
_DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


def content_hashes(
    clips: Sequence[Clip], memo: Path, progress: Callable[[int, int], None] | None = None
) -> NDArray[np.bytes_]:
    """S32 (N,): 32 hexadecimal digits for the media of each clip; zeros where a file of it cannot be read.

    Captions do not count.

    Args:
        clips: N clips; a clip of several images is the hash of their hashes.
        memo: SQLite file that remembers hashes by address, size and version; processes may share it. A folder that
            refuses it costs time only: then all files are read again.
        progress: Called with (clips done, N).
    """
    hashes = np.full(len(clips), UNREADABLE, "S32")
    with _Memo(memo) as known, ThreadPoolExecutor(_NUM_THREADS) as pool:
        for start in range(0, len(clips), _AT_ONCE):
            block = [clips[position] for position in range(start, min(start + _AT_ONCE, len(clips)))]
            now = _block_hashes(block, known, pool)
            for position, clip in enumerate(block, start):
                hashes[position] = _of_clip(clip, now)
            if progress is not None:
                progress(start + len(block), len(clips))
    return hashes


def media_hash(address: str, stat: MediaStat) -> str:
    """32 hexadecimal digits for the content of a file.

    Files up to 1 MiB are hashed whole. Of larger ones the size and 16 evenly spread blocks of 64 KiB are, the first and
    last among
    them: that reads 1 MiB a clip instead of all, and the table of sample sizes at one end of an MP4 differs after any
    new encoding. A byte changed in place between the blocks goes unnoticed.

    Raises:
        MediaError: It cannot be read.
    """
    size = stat.size
    digest = hashlib.sha256(f"{size}:".encode())
    with open_media(address) as file:
        if size <= _BLOCK * _NUM_BLOCKS:
            digest.update(file.read())
        else:
            for i in range(_NUM_BLOCKS):
                file.seek((size - _BLOCK) * i // (_NUM_BLOCKS - 1))
                digest.update(file.read(_BLOCK))
    return digest.hexdigest()[:32]


def _block_hashes(clips: Sequence[Clip], memo: _Memo, pool: ThreadPoolExecutor) -> dict[str, _Known | None]:
    """Address to what is known of each file of some clips; what is new is remembered."""
    addresses = list(dict.fromkeys(address for clip in clips for address in clip.frames or (clip.video,)))
    names = [_stable(address) for address in addresses]
    found = memo.find(names)
    before = [found.get(name) for name in names]
    now = list(pool.map(_look, addresses, before))
    memo.add(
        [(name, *new) for name, old, new in zip(names, before, now, strict=True) if new is not None and new != old]
    )
    return dict(zip(addresses, now, strict=True))


def _of_clip(clip: Clip, known: dict[str, _Known | None]) -> bytes:
    if not clip.frames:
        entry = known[clip.video]
        return entry[2].encode() if entry else UNREADABLE
    entries = [known[address] for address in clip.frames]
    parts = [entry[2] for entry in entries if entry]
    if len(parts) < len(entries):
        return UNREADABLE
    return hashlib.sha256(("frames:" + ",".join(parts)).encode()).hexdigest()[:32].encode()


def _stable(address: str) -> str:
    """The same text for a file from whichever folder a program is started."""
    try:
        path = local_path(address)
    except MediaError:
        return address
    return address if path is None else os.path.abspath(path)


def _look(address: str, before: _Known | None) -> _Known | None:
    """Size, version and hash of a file; None where it cannot be read."""
    try:
        stat = stat_media(address)
        if before is not None and before[:2] == (stat.size, stat.version):
            return before
        return stat.size, stat.version, media_hash(address, stat)
    except (MediaError, OSError):
        return None


class _Memo:
    """The hashes of earlier calls; none, with one warning, where the file cannot be used.

    A damaged file is made again, and a damaged row counts as none.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._base: sqlite3.Connection | None = None
        self._is_made_again = False

    def __enter__(self) -> _Memo:
        self._connect()
        return self

    def _connect(self) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._base = sqlite3.connect(self.path, timeout=_LOCK_TIMEOUT_S)
            self._base.text_factory = lambda text: text.decode(errors="replace")
            self._base.execute(_TABLE)
        except (OSError, sqlite3.Error) as error:
            self._give_up(error)

    def __exit__(self, *_: object) -> None:
        if self._base is not None:
            self._base.close()

    def find(self, addresses: Iterable[str]) -> dict[str, _Known]:
        """What is remembered of some files."""
        found: dict[str, _Known] = {}
        names = list(addresses)
        for start in range(0, len(names), 500):  # SQLite limits the number of values in a statement
            if self._base is None:
                break
            part = names[start : start + 500]
            query = f"SELECT address, size, version, hash, checksum FROM hashes WHERE address IN ({','.join('?' * len(part))})"
            try:
                rows = self._base.execute(query, part).fetchall()
                found |= {
                    address: tuple(known)
                    for address, *known, checksum in rows
                    if checksum == _checksum(address, *known)
                }
            except sqlite3.Error as error:
                self._give_up(error)
        return found

    def add(self, rows: Sequence[tuple[str, int, str, str]]) -> None:
        """Remember files."""
        if self._base is None or not rows:
            return
        try:
            with self._base:
                self._base.executemany(
                    "INSERT OR REPLACE INTO hashes VALUES (?, ?, ?, ?, ?)", [(*row, _checksum(*row)) for row in rows]
                )
        except sqlite3.Error as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        if self._base is not None:
            self._base.close()
        self._base = None
        if getattr(error, "sqlite_errorcode", 0) & 0xFF in _DAMAGED and not self._is_made_again:
            self._is_made_again = True
            for path in (
                self.path,
                *(self.path.with_name(f"{self.path.name}-{part}") for part in ("journal", "wal", "shm")),
            ):
                with contextlib.suppress(OSError):
                    path.unlink()
            self._connect()
            return
        warnings.warn(
            f"{self.path} cannot be used ({error}), so all videos are read for their hashes each time", stacklevel=4
        )


def _checksum(*row: object) -> int:
    return zlib.crc32(repr(row).encode("utf-8", "surrogatepass"))
