"""Bytes of whole files, on a local disk or on one of the object stores that fsspec knows.

A place is a local path or a URL. Files are opened for each use: no handle is kept, so processes may fork at any time.
"""

from __future__ import annotations

import io
import os
import re
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from vlmcap.errors import first_line

if TYPE_CHECKING:
    from typing_extensions import Buffer

SCHEMES = ("file", "memory", "http", "https", "s3", "gs", "gcs", "abfs", "az", "hf")
"""Kinds of URL that are opened.

Everything else that fsspec could do (shells, archives to disk, notebooks) is refused.
"""

REMOTE_BLOCK_BYTES = 64 * 1024
_VERSION_KEYS = (
    "ETag",
    "etag",
    "md5Hash",
    "checksum",
    "sha256",
    "mtime",
    "LastModified",
    "last_modified",
    "updated",
    "created",
)


class MediaError(Exception):
    """Why a file or a member of an archive cannot be read, in one sentence."""


@dataclass(frozen=True, slots=True)
class MediaStat:
    """Size in bytes, and a version that changes when the content does."""

    size: int
    version: str


def scheme_of(place: str) -> str:
    """The scheme of a URL, "" for a local path.

    Raises:
        MediaError: The scheme is none of `SCHEMES`, or the URL chains file systems.
    """
    scheme, separator, rest = place.partition("://")
    if not separator or "/" in scheme:
        return ""
    if scheme not in SCHEMES:
        kinds = ", ".join(SCHEMES)
        raise MediaError(f"{place}: addresses of kind '{scheme}' are not opened, only {kinds}, zip and tar")
    if "::" in rest:
        raise MediaError(
            f"{place} chains file systems: only zip://MEMBER::ARCHIVE and tar://MEMBER::ARCHIVE are opened"
        )
    return scheme


def local_file(place: str) -> str | None:
    """The path of the local file that `place` names, `file://` URLs included; None for other URLs."""
    scheme = scheme_of(place)
    return place.removeprefix("file://") if scheme in ("", "file") else None


@contextmanager
def explained(place: str) -> Iterator[None]:
    """Errors of the operating system and of fsspec's many backends as `MediaError`, with the name of the place."""
    try:
        yield
    except MediaError:
        raise
    except FileNotFoundError as error:
        raise MediaError(f"{place} does not exist") from error
    except ImportError as error:
        raise MediaError(f"{place} needs a package that is not installed: {first_line(error)}") from error
    except Exception as error:  # backends raise their own kinds: botocore's, aiohttp's, google's
        raise MediaError(f"{place} cannot be read: {first_line(error)}") from error


def stat_file(place: str) -> MediaStat:
    """Size and version of a file.

    Its times of modification and change and its inode, or what the store tells (entity tag, checksum, time).

    Raises:
        MediaError: There is no such file, it is no regular file, or its size is unknown.
    """
    path = local_file(place)
    with explained(place):
        if path is not None:
            return _stat_local(path)
        system, name = _file_system(place)
        info: Mapping[str, Any] = system.info(name)
        if info.get("type", "file") != "file" or not isinstance(info.get("size"), int):
            raise MediaError(f"{place} is no file of a known size")
        version = next((str(info[key]) for key in _VERSION_KEYS if info.get(key)), "")
        return MediaStat(info["size"], version)


def open_file(place: str) -> BinaryIO:
    """The file, readable and seekable; a remote one is read in ranges of about `REMOTE_BLOCK_BYTES` as they are wanted.

    Raises:
        MediaError: It cannot be opened.
    """
    path = local_file(place)
    with explained(place):
        if path is not None:
            _stat_local(path)  # a named pipe would never open
            return open(path, "rb")
        system, name = _file_system(place)
        size = stat_file(place).size
        remote = system.open(name, "rb", block_size=REMOTE_BLOCK_BYTES, cache_type="readahead")
    return Window.of(cast("BinaryIO", remote), 0, size)


def read_range(place: str, start: int, end: int) -> bytes:
    """Bytes `start` to `end` of a file, in one request where it is remote; fewer where the file is shorter.

    Raises:
        MediaError: The file cannot be read.
    """
    path = local_file(place)
    with explained(place):
        if path is None:
            system, name = _file_system(place)
            return bytes(system.cat_file(name, start=start, end=end)) if end > start else b""
        _stat_local(path)
        with open(path, "rb") as file:
            file.seek(start)
            return file.read(end - start)


def list_files(pattern: str) -> list[str]:
    """Places of the files that match a pattern with `*`, `?` and `**`, sorted; they begin as the pattern does.

    Raises:
        MediaError: The folder cannot be listed.
    """
    folder = re.split(r"[*?\[]", pattern, maxsplit=1)[0].rpartition("/")[0]
    with explained(pattern):
        system, name = _file_system(pattern)
        base = str(system._strip_protocol(folder))
        infos: Mapping[str, Mapping[str, Any]] = system.glob(name, detail=True)
        found = sorted(str(match) for match, info in infos.items() if info.get("type", "file") == "file")
        prefix = f"{folder}/" if folder else ""
        return [prefix + match.removeprefix(base).lstrip("/") for match in found]


def _stat_local(path: str) -> MediaStat:
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise MediaError(f"{path} is no regular file")
    # The time of change and the inode as well: tools that copy keep the time of modification, and two clips may have
    # one size.
    return MediaStat(status.st_size, f"{status.st_mtime_ns}-{status.st_ctime_ns}-{status.st_ino}")


def _file_system(place: str) -> tuple[Any, str]:
    """The file system that fsspec keeps for this process, and its name of the place."""
    import fsspec

    scheme = scheme_of(place) or "file"
    system = fsspec.filesystem(scheme)
    return system, system._strip_protocol(place)


class Window(io.RawIOBase):
    """Part of an open file as a file of its own; closing it closes the file."""

    def __init__(self, file: BinaryIO, start: int, size: int) -> None:
        self._file, self._start, self._size, self._position = file, start, size, 0

    @classmethod
    def of(cls, file: BinaryIO, start: int, size: int) -> BinaryIO:
        """`size` bytes of `file` from `start`, buffered."""
        return io.BufferedReader(cls(file, start, size), REMOTE_BLOCK_BYTES)

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True."""
        return True

    def tell(self) -> int:
        """The position in the window."""
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """The new position in the window; beyond its end, reads are empty."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        if base + offset < 0:
            raise OSError("a position before the beginning")
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Buffer) -> int:
        """Fills `buffer` as far as one read goes; the number of bytes."""
        view = memoryview(buffer).cast("B")
        count = max(0, min(len(view), self._size - self._position))
        if not count:
            return 0
        try:
            self._file.seek(self._start + self._position)
            data = self._file.read(count)
        except OSError:
            raise
        except Exception as error:  # remote files raise their backend's own kinds, and decoders expect those of a file
            raise OSError(first_line(error)) from error
        view[: len(data)] = data
        self._position += len(data)
        return len(data)

    def close(self) -> None:
        """Closes the file below."""
        if not self.closed:
            self._file.close()
        super().close()
