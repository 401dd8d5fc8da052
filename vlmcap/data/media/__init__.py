"""Videos, images and texts by address: a local path, a URL, or a member of an archive, which is read in place.

An address is a str: `clips/a.mp4`, `s3://bucket/a.mp4`, `zip://MEMBER::ARCHIVE` or `tar://MEMBER::ARCHIVE`, the archive
being a local path or a URL. A member that is not compressed is a window on its archive; nothing is unpacked to disk.
"""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

from vlmcap.data.media.archive_cache import index_of, use_index_folder
from vlmcap.data.media.archives import ENCRYPTED, Member, Place, kind_of
from vlmcap.data.media.storage import (
    MediaError,
    MediaStat,
    Window,
    explained,
    local_file,
    open_file,
    read_range,
    stat_file,
)

__all__ = [
    "Address",
    "MediaError",
    "MediaStat",
    "Member",
    "list_members",
    "local_path",
    "member_address",
    "open_media",
    "parse_address",
    "read_text",
    "stat_media",
    "use_index_folder",
]

MAX_MEMBER_BYTES = 1024**3
"""A compressed member is decompressed into memory up to this size."""
MAX_RATIO = 200
"""Times that a compressed member may grow once it is above a mebibyte; video and pictures grow by a few percent."""
MAX_TEXT_BYTES = 2 * 1024**3
WHOLE_READ_BYTES = 64 * 1024**2
"""Remote files and members up to this size come in one request and stay in memory.

Larger ones in ranges as they are wanted.
"""

_LOCAL_HEADER = struct.Struct("<4s22xHH")


class Address(NamedTuple):
    """An address in parts: `kind` is "zip", "tar" or "" for a plain file, whose `member` is ""."""

    kind: str
    member: str
    file: str


def parse_address(address: str) -> Address:
    """The parts of an address.

    Raises:
        MediaError: It names a member and no archive, or an archive within an archive.
    """
    kind, separator, rest = address.partition("://")
    if not separator or kind not in ("zip", "tar"):
        return Address("", "", address)
    member, separator, archive = rest.rpartition("::")
    if not separator or not member or not archive:
        raise MediaError(f"{address} is no address of a member: write {kind}://MEMBER::ARCHIVE")
    if "://" in member or archive.partition("://")[0] in ("zip", "tar"):
        raise MediaError(
            f"{address} chains file systems: an archive within an archive is not read, unpack the outer one"
        )
    return Address(kind, member, archive)


def member_address(archive: str, member: str) -> str:
    """The address of a member of an archive, whose name ends in .zip or .tar.

    Raises:
        MediaError: The name says another kind of archive.
    """
    return f"{kind_of(archive)}://{member}::{archive}"


def local_path(address: str) -> Path | None:
    """The file, where the address is that of a plain local one."""
    parts = parse_address(address)
    path = None if parts.kind else local_file(parts.file)
    return None if path is None else Path(path)


def open_media(address: str) -> BinaryIO:
    """The content, readable and seekable; opened anew for each call, so safe in any process.

    Raises:
        MediaError: It is not there, is encrypted, damaged, or compressed in a way or to a degree that is refused.
    """
    parts = parse_address(address)
    if parts.kind:
        place = _find(address, parts)
        if parts.kind == "zip":
            return _open_zipped(address, parts.file, place)
        return _open_window(address, parts.file, place.start, place.size)
    if local_file(parts.file) is None:
        return _open_window(address, parts.file, 0, stat_file(parts.file).size)
    return open_file(parts.file)


def stat_media(address: str) -> MediaStat:
    """Size in bytes and version of the content; of a member, the archive's version and the position in it.

    Raises:
        MediaError: It is not there.
    """
    parts = parse_address(address)
    if not parts.kind:
        return stat_file(parts.file)
    place = _find(address, parts)
    return MediaStat(place.size, f"{index_of(parts.file, parts.kind).version}+{place.start}")


def list_members(archive: str) -> Sequence[Member]:
    """The files in an archive, in its order, without folders, links and devices.

    Raises:
        MediaError: It cannot be read or is no .zip or uncompressed .tar.
    """
    return index_of(archive, kind_of(archive))


def read_text(address: str, max_bytes: int = MAX_TEXT_BYTES) -> str:
    """The content as UTF-8 text, a byte order mark left out.

    Raises:
        MediaError: It cannot be read, is larger than `max_bytes`, or is no UTF-8.
    """
    with explained(address), open_media(address) as file:
        raw = file.read(max_bytes + 1)
    if len(raw) > max_bytes:
        raise MediaError(f"{address} has more than {max_bytes} bytes of text")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        guess = "UTF-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else "another encoding, such as cp949"
        raise MediaError(f"{address} is no UTF-8 text (byte {error.start}; it may be {guess}): convert it") from error


def _find(address: str, parts: Address) -> Place:
    place = index_of(parts.file, parts.kind).find(parts.member)
    if place is None:
        raise MediaError(f"{parts.file} has no member {parts.member}")
    return place


def _open_window(address: str, file: str, start: int, size: int) -> BinaryIO:
    if local_file(file) is None and size <= WHOLE_READ_BYTES:
        return io.BytesIO(_whole(address, read_range(file, start, start + size), size))
    return Window.of(open_file(file), start, size)


def _open_zipped(address: str, archive: str, place: Place) -> BinaryIO:
    if place.method == ENCRYPTED:
        raise MediaError(f"{address} is encrypted: pack it again without a password")
    if place.method not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise MediaError(
            f"{address} is compressed by method {place.method}, which is not read: pack it again with zip -0"
        )
    is_stored = place.method == zipfile.ZIP_STORED
    if is_stored and place.size != place.packed:
        raise MediaError(f"{address} is damaged: its two sizes differ")
    if not is_stored:
        _check_growth(address, place)
    if local_file(archive) is None and place.end - place.start <= WHOLE_READ_BYTES:  # header and content in one request
        block = _whole(address, read_range(archive, place.start, place.end), place.end - place.start)
        start = _content_start(address, block[: _LOCAL_HEADER.size], place) - place.start
        return io.BytesIO(_unpack(address, block[start : start + place.packed], place))
    start = _content_start(address, read_range(archive, place.start, place.start + _LOCAL_HEADER.size), place)
    if is_stored:
        return Window.of(open_file(archive), start, place.size)
    return io.BytesIO(_unpack(address, read_range(archive, start, start + place.packed), place))


def _content_start(address: str, header: bytes, place: Place) -> int:
    """Position in the archive at which the content begins.

    The local header's extra field may differ from the central one.
    """
    if len(header) < _LOCAL_HEADER.size or not header.startswith(b"PK\3\4"):
        raise MediaError(f"{address} is damaged: its header is not where the archive's directory says")
    _, name_bytes, extra_bytes = _LOCAL_HEADER.unpack(header)
    start = place.start + _LOCAL_HEADER.size + int(name_bytes) + int(extra_bytes)
    if start + place.packed > place.end:  # members that share bytes make a small archive endless
        raise MediaError(f"{address} overlaps with its neighbour: the archive is damaged or made to harm")
    return start


def _check_growth(address: str, place: Place) -> None:
    if place.size > MAX_MEMBER_BYTES:
        raise MediaError(
            f"{address} has {place.size} bytes, and compressed members are read up to {MAX_MEMBER_BYTES}: pack it "
            "with zip -0"
        )
    if place.size > max(1024**2, MAX_RATIO * place.packed):
        raise MediaError(f"{address} grows more than {MAX_RATIO} times when decompressed: no video or picture does")


def _unpack(address: str, packed: bytes, place: Place) -> bytes:
    content = _whole(address, packed, place.packed)
    if place.method == zipfile.ZIP_DEFLATED:
        try:  # the size may be a lie, so no more than one byte above it is made
            content = zlib.decompressobj(-zlib.MAX_WBITS).decompress(packed, place.size + 1)
        except zlib.error as error:
            raise MediaError(f"{address} is damaged ({error})") from error
    if len(content) != place.size or zlib.crc32(content) != place.crc:
        raise MediaError(f"{address} is damaged: its size or checksum is not what the archive's directory says")
    return content


def _whole(address: str, content: bytes, size: int) -> bytes:
    if len(content) != size:
        raise MediaError(f"{address} ends after {len(content)} of {size} bytes")
    return content
