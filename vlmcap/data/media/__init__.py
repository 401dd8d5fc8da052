"""Videos, images and texts by address: a local path, a URL, or a member of an archive, which is read in place.

An address is a str: `clips/a.mp4`, `s3://bucket/a.mp4`, `zip://MEMBER::ARCHIVE` or `tar://MEMBER::ARCHIVE`, where the
archive is a local path or a URL. An uncompressed member is read as a window of its archive; nothing is unpacked to
disk.
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
from vlmcap.data.media.archives import ENCRYPTED, Member, MemberSpan, kind_of
from vlmcap.data.media.storage import (
    MediaError,
    MediaStat,
    Window,
    as_media_errors,
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
"""Largest size of a compressed member, which is decompressed into memory."""
MAX_RATIO = 200
"""Largest ratio by which a compressed member above 1 MiB may expand; video and pictures expand by a few percent."""
MAX_TEXT_BYTES = 2 * 1024**3
WHOLE_READ_BYTES = 64 * 1024**2
"""Remote files and members up to this size are fetched in one request and stay in memory; larger ones in ranges."""

_LOCAL_HEADER = struct.Struct("<4s22xHH")


class Address(NamedTuple):
    """The components of an address: `kind` is "zip", "tar" or "" for a plain file, whose `member` is ""."""

    kind: str
    member: str
    file: str


def parse_address(address: str) -> Address:
    """Splits an address into its components.

    Raises:
        MediaError: The address names a member but no archive, or an archive within an archive.
    """
    kind, separator, rest = address.partition("://")
    if not separator or kind not in ("zip", "tar"):
        return Address("", "", address)
    # The last :: separates, as the name of a member may contain one.
    member, separator, archive = rest.rpartition("::")
    if not separator or not member or not archive:
        raise MediaError(f"{address} is not the address of a member; write {kind}://MEMBER::ARCHIVE")
    if "://" in member or archive.partition("://")[0] in ("zip", "tar"):
        raise MediaError(
            f"{address} chains file systems, but an archive within an archive cannot be read; unpack the outer one"
        )
    return Address(kind, member, archive)


def member_address(archive: str, member: str) -> str:
    """Returns the address of a member of an archive, whose name ends in .zip or .tar.

    Raises:
        MediaError: The name has another ending.
    """
    return f"{kind_of(archive)}://{member}::{archive}"


def local_path(address: str) -> Path | None:
    """Returns the path of a plain local file, or None for other addresses."""
    parts = parse_address(address)
    path = None if parts.kind else local_file(parts.file)
    return None if path is None else Path(path)


def open_media(address: str) -> BinaryIO:
    """Opens the content, readable and seekable; each call opens it again, so this is safe in any process.

    Raises:
        MediaError: The content does not exist, is encrypted, damaged, or compressed in a way or to a degree that is
            refused.
    """
    parts = parse_address(address)
    if parts.kind:
        span = _find_span(address, parts)
        if parts.kind == "zip":
            return _open_zipped(address, parts.file, span)
        return _open_window(address, parts.file, span.start, span.size)
    if local_file(parts.file) is None:
        return _open_window(address, parts.file, 0, stat_file(parts.file).size)
    return open_file(parts.file)


def stat_media(address: str) -> MediaStat:
    """Returns size in bytes and version of the content; for a member, the archive's version and the position in it.

    Raises:
        MediaError: The content does not exist.
    """
    parts = parse_address(address)
    if not parts.kind:
        return stat_file(parts.file)
    span = _find_span(address, parts)
    return MediaStat(span.size, f"{index_of(parts.file, parts.kind).version}+{span.start}")


def list_members(archive: str) -> Sequence[Member]:
    """Lists the files in an archive in its order, without folders, links and devices.

    Raises:
        MediaError: The archive cannot be read, or is not a .zip or uncompressed .tar file.
    """
    return index_of(archive, kind_of(archive))


def read_text(address: str, max_bytes: int = MAX_TEXT_BYTES) -> str:
    """Reads the content as UTF-8 text without a byte order mark.

    Raises:
        MediaError: The content cannot be read, is larger than `max_bytes`, or is not UTF-8.
    """
    with as_media_errors(address), open_media(address) as file:
        # One byte more shows whether there is more.
        raw = file.read(max_bytes + 1)
    if len(raw) > max_bytes:
        raise MediaError(f"{address} has more than {max_bytes} bytes of text; split the file")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        guess = "UTF-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else "another encoding, such as cp949"
        raise MediaError(
            f"{address} is not UTF-8 text (byte {error.start}; it may be {guess}); convert it to UTF-8"
        ) from error


def _find_span(address: str, parts: Address) -> MemberSpan:
    span = index_of(parts.file, parts.kind).find(parts.member)
    if span is None:
        raise MediaError(f"{parts.file} has no member {parts.member}")
    return span


def _open_window(address: str, file: str, start: int, size: int) -> BinaryIO:
    if local_file(file) is None and size <= WHOLE_READ_BYTES:
        return io.BytesIO(_checked_length(address, read_range(file, start, start + size), size))
    return Window.of(open_file(file), start, size)


def _open_zipped(address: str, archive: str, span: MemberSpan) -> BinaryIO:
    if span.method == ENCRYPTED:
        raise MediaError(f"{address} is encrypted; pack it again without a password")
    if span.method not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise MediaError(
            f"{address} is compressed by method {span.method}, which is not supported; pack it again with zip -0"
        )
    is_stored = span.method == zipfile.ZIP_STORED
    # 1. Refuse what is damaged, or expands too much, before anything is read.
    if is_stored and span.size != span.packed:
        raise MediaError(f"{address} is damaged, its two sizes differ; copy the archive again")
    if not is_stored:
        _check_growth(address, span)
    # 2. A small member of a remote archive: header and content in one request.
    if local_file(archive) is None and span.end - span.start <= WHOLE_READ_BYTES:
        block = _checked_length(address, read_range(archive, span.start, span.end), span.end - span.start)
        start = _content_start(address, block[: _LOCAL_HEADER.size], span) - span.start
        return io.BytesIO(_unpack(address, block[start : start + span.packed], span))
    # 3. Otherwise the header alone tells where the content begins; stored content is read in place.
    start = _content_start(address, read_range(archive, span.start, span.start + _LOCAL_HEADER.size), span)
    if is_stored:
        return Window.of(open_file(archive), start, span.size)
    return io.BytesIO(_unpack(address, read_range(archive, start, start + span.packed), span))


def _content_start(address: str, header: bytes, span: MemberSpan) -> int:
    """Returns the position in the archive at which the content begins.

    The extra field of the local header may differ from that of the central directory.
    """
    if len(header) < _LOCAL_HEADER.size or not header.startswith(b"PK\3\4"):
        raise MediaError(f"{address} is damaged, its header is not where the archive's directory says; copy it again")
    _, name_bytes, extra_bytes = _LOCAL_HEADER.unpack(header)
    start = span.start + _LOCAL_HEADER.size + int(name_bytes) + int(extra_bytes)
    if start + span.packed > span.end:  # members that share bytes let a small archive expand without limit
        raise MediaError(f"{address} overlaps with its neighbour; the archive is damaged or malicious")
    return start


def _check_growth(address: str, span: MemberSpan) -> None:
    if span.size > MAX_MEMBER_BYTES:
        raise MediaError(
            f"{address} has {span.size} bytes, but compressed members are limited to {MAX_MEMBER_BYTES}; pack it "
            "again with zip -0"
        )
    if span.size > max(1024**2, MAX_RATIO * span.packed):
        raise MediaError(
            f"{address} expands more than {MAX_RATIO} times when decompressed, as no video or picture does; replace it"
        )


def _unpack(address: str, packed: bytes, span: MemberSpan) -> bytes:
    content = _checked_length(address, packed, span.packed)
    if span.method == zipfile.ZIP_DEFLATED:
        try:  # the stated size may be false, so at most one byte more is decompressed
            # Raw deflate data, without a header of zlib.
            content = zlib.decompressobj(-zlib.MAX_WBITS).decompress(packed, span.size + 1)
        except zlib.error as error:
            raise MediaError(f"{address} is damaged ({error})") from error
    if len(content) != span.size or zlib.crc32(content) != span.crc:
        raise MediaError(
            f"{address} is damaged, its size or checksum differs from the archive's directory; copy it again"
        )
    return content


def _checked_length(address: str, content: bytes, size: int) -> bytes:
    if len(content) != size:
        raise MediaError(f"{address} ends after {len(content)} of {size} bytes; copy it again")
    return content
