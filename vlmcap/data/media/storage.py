"""Bytes of whole files on a local disk or on an object store that fsspec supports.

A location is a local path or a URL. Files are opened for each use: no handle is kept, so processes may fork at any
time.
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
"""Supported URL schemes; everything else that fsspec can do (shells, archives to disk, notebooks) is refused."""

REMOTE_BLOCK_BYTES = 64 * 1024
# Keys of fsspec's `info` that change with the content, the most reliable first; backends use different ones.
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
    """The reason why a file or a member of an archive cannot be read, in one sentence."""


@dataclass(frozen=True, slots=True)
class MediaStat:
    """Size in bytes, and a version that changes with the content."""

    size: int
    version: str


def scheme_of(location: str) -> str:
    """Returns the scheme of a URL, "" for a local path.

    Raises:
        MediaError: The scheme is not in `SCHEMES`, or the URL chains file systems.
    """
    scheme, separator, rest = location.partition("://")
    if not separator or "/" in scheme:
        return ""
    if scheme not in SCHEMES:
        kinds = ", ".join(SCHEMES)
        raise MediaError(f"{location} has the unsupported scheme '{scheme}'; use one of {kinds}, zip and tar")
    if "::" in rest:
        raise MediaError(
            f"{location} chains file systems; of such addresses only zip://MEMBER::ARCHIVE and tar://MEMBER::ARCHIVE "
            "are supported"
        )
    return scheme


def local_file(location: str) -> str | None:
    """Returns the path of the local file that `location` names, `file://` URLs included; None for other URLs."""
    scheme = scheme_of(location)
    return location.removeprefix("file://") if scheme in ("", "file") else None


@contextmanager
def as_media_errors(location: str) -> Iterator[None]:
    """Converts errors of the operating system and of fsspec's backends into a `MediaError` that names the location."""
    try:
        yield
    except MediaError:
        raise
    except FileNotFoundError as error:
        raise MediaError(f"{location} does not exist") from error
    except ImportError as error:
        raise MediaError(
            f"{location} needs a package that is not installed ({first_line(error)}); install it"
        ) from error
    except Exception as error:  # backends have their own exceptions: botocore's, aiohttp's, google's
        raise MediaError(f"{location} cannot be read: {first_line(error)}") from error


def stat_file(location: str) -> MediaStat:
    """Returns size and version of a file.

    The version is made of its modification time, change time and inode, or of what the store reports (entity tag,
    checksum, time).

    Raises:
        MediaError: The file does not exist, is not a regular file, or its size is unknown.
    """
    path = local_file(location)
    with as_media_errors(location):
        if path is not None:
            return _stat_local(path)
        system, name = _file_system(location)
        info: Mapping[str, Any] = system.info(name)
        if info.get("type", "file") != "file" or not isinstance(info.get("size"), int):
            raise MediaError(f"{location} is not a file of known size")
        version = next((str(info[key]) for key in _VERSION_KEYS if info.get(key)), "")
        return MediaStat(info["size"], version)


def open_file(location: str) -> BinaryIO:
    """Opens a file, readable and seekable; a remote one is read on demand in ranges of about `REMOTE_BLOCK_BYTES`.

    Raises:
        MediaError: The file cannot be opened.
    """
    path = local_file(location)
    with as_media_errors(location):
        if path is not None:
            _stat_local(path)  # opening a named pipe would block
            return open(path, "rb")
        system, name = _file_system(location)
        size = stat_file(location).size
        remote = system.open(name, "rb", block_size=REMOTE_BLOCK_BYTES, cache_type="readahead")
    return Window.of(cast("BinaryIO", remote), 0, size)


def read_range(location: str, start: int, end: int) -> bytes:
    """Reads bytes `start` to `end` of a file, in one request if it is remote; fewer if the file is shorter.

    Raises:
        MediaError: The file cannot be read.
    """
    path = local_file(location)
    with as_media_errors(location):
        if path is None:
            system, name = _file_system(location)
            return bytes(system.cat_file(name, start=start, end=end)) if end > start else b""
        _stat_local(path)
        with open(path, "rb") as file:
            file.seek(start)
            return file.read(end - start)


def list_files(pattern: str) -> list[str]:
    """Lists the files that match a pattern with `*`, `?` and `**`, sorted; their names begin like the pattern.

    Raises:
        MediaError: The folder cannot be listed.
    """
    # The part before the first wildcard, up to its last slash.
    folder = re.split(r"[*?\[]", pattern, maxsplit=1)[0].rpartition("/")[0]
    with as_media_errors(pattern):
        system, name = _file_system(pattern)
        base = str(system._strip_protocol(folder))
        infos: Mapping[str, Mapping[str, Any]] = system.glob(name, detail=True)
        files = sorted(str(match) for match, info in infos.items() if info.get("type", "file") == "file")
        prefix = f"{folder}/" if folder else ""
        return [prefix + match.removeprefix(base).lstrip("/") for match in files]


def _stat_local(path: str) -> MediaStat:
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise MediaError(f"{path} is not a regular file")
    # Change time and inode as well: copying tools keep the modification time, and two clips may have the same size.
    return MediaStat(status.st_size, f"{status.st_mtime_ns}-{status.st_ctime_ns}-{status.st_ino}")


def _file_system(location: str) -> tuple[Any, str]:
    """Returns the file system that fsspec caches in this process, and its name for the location."""
    import fsspec

    scheme = scheme_of(location) or "file"
    system = fsspec.filesystem(scheme)
    return system, system._strip_protocol(location)


class Window(io.RawIOBase):
    """A section of an open file that acts as a file; closing it closes the underlying file."""

    def __init__(self, file: BinaryIO, start: int, size: int) -> None:
        self._file, self._start, self._size, self._position = file, start, size, 0

    @classmethod
    def of(cls, file: BinaryIO, start: int, size: int) -> BinaryIO:
        """Returns a buffered window on `size` bytes of `file` from `start`."""
        # Decoders read a few bytes at a time.
        return io.BufferedReader(cls(file, start, size), REMOTE_BLOCK_BYTES)

    def readable(self) -> bool:
        """Returns True."""
        return True

    def seekable(self) -> bool:
        """Returns True."""
        return True

    def tell(self) -> int:
        """Returns the position in the window."""
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Moves to a position in the window and returns it; reads beyond the end are empty."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        if base + offset < 0:
            raise OSError("a position before the beginning")
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Buffer) -> int:
        """Fills `buffer` by a single read and returns the number of bytes."""
        view = memoryview(buffer).cast("B")
        count = max(0, min(len(view), self._size - self._position))
        if not count:
            return 0
        try:
            self._file.seek(self._start + self._position)
            data = self._file.read(count)
        except OSError:
            raise
        except Exception as error:  # remote files raise their backend's exceptions, but decoders expect OSError
            raise OSError(first_line(error)) from error
        view[: len(data)] = data
        self._position += len(data)
        return len(data)

    def close(self) -> None:
        """Closes the window and the underlying file."""
        if not self.closed:
            self._file.close()
        super().close()
