"""Index of a zip or tar archive: names, sizes and positions of its members, read one time and kept small.

Nothing is ever unpacked to disk, so a member's name is a key and not a path: `..`, a leading `/` or a backslash in it
have no effect.
"""

from __future__ import annotations

import re
import tarfile
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, BinaryIO, NamedTuple, cast, overload

import numpy as np
from numpy.typing import NDArray

from vlmcap.data.media.storage import MediaError, as_media_errors, open_file

ENCRYPTED = 0xFFFF
"""Value that replaces the method of encrypted members."""

_HANGUL = re.compile(r"[\uac00-\ud7a3\u1100-\u11ff\u3131-\u318e]")
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_SPAN = np.dtype(
    [("start", "<i8"), ("end", "<i8"), ("packed", "<i8"), ("size", "<i8"), ("crc", "<u4"), ("method", "<u2")]
)


class Member(NamedTuple):
    """A file in an archive; `size` is in bytes, after decompression."""

    name: str
    size: int


class MemberSpan(NamedTuple):
    """The location of a member: bytes `start` to `end` hold its content and, in a zip, its local header.

    The content takes `packed` bytes in the archive and `size` bytes after decompression.
    """

    start: int
    end: int
    packed: int
    size: int
    crc: int
    method: int


@dataclass(frozen=True, eq=False)
class ArchiveIndex(Sequence[Member]):
    """The regular files of an archive in its order; of two files with the same name, the last.

    Attributes:
        kind: "zip" or "tar".
        version: Version of the archive, as in `MediaStat`.
        names: Names of the members.
        spans: Locations of the members, a structured array.
    """

    kind: str
    version: str
    names: list[str]
    spans: NDArray[np.void]

    def __post_init__(self) -> None:
        object.__setattr__(self, "_positions", {name: position for position, name in enumerate(self.names)})

    def __len__(self) -> int:
        return len(self.names)

    @overload
    def __getitem__(self, key: int) -> Member: ...
    @overload
    def __getitem__(self, key: slice) -> Sequence[Member]: ...
    def __getitem__(self, key: int | slice) -> Member | Sequence[Member]:
        if isinstance(key, slice):
            return [self[position] for position in range(*key.indices(len(self)))]
        return Member(self.names[key], int(self.spans["size"][key]))

    def find(self, name: str) -> MemberSpan | None:
        """Returns the location of a member, or None."""
        positions = cast("dict[str, int]", self._positions)  # type: ignore[attr-defined]
        position = positions.get(name)
        return None if position is None else MemberSpan(*self.spans[position].item())


def kind_of(archive: str) -> str:
    """Returns the kind of an archive by the ending of its name: "zip" or "tar".

    Raises:
        MediaError: It is neither, or a compressed tar, whose members can only be reached by reading all before them.
    """
    suffixes = [suffix.lower() for suffix in PurePosixPath(archive).suffixes[-2:]]
    if suffixes[-1:] in ([".zip"], [".tar"]):
        return suffixes[-1][1:]
    if suffixes[:1] == [".tar"] or suffixes[-1:] in ([".tgz"], [".tbz2"], [".txz"], [".tzst"]):
        raise _compressed_tar(archive, suffixes[-1][1:])
    raise MediaError(f"{archive} is not an archive that can be read in place; use a .zip or an uncompressed .tar file")


def read_index(archive: str, kind: str, version: str) -> ArchiveIndex:
    """Reads the index of an archive from its central directory (zip) or its headers (tar).

    Raises:
        MediaError: The archive cannot be read, is damaged, is of another kind, or is a compressed tar.
    """
    with as_media_errors(archive), open_file(archive) as file:
        latest = dict(_zip_spans(archive, file) if kind == "zip" else _tar_spans(archive, file))
    names = list(latest)
    return ArchiveIndex(kind, version, names, np.array([tuple(span) for span in latest.values()], dtype=_SPAN))


def _zip_spans(archive: str, file: BinaryIO) -> Iterable[tuple[str, MemberSpan]]:
    try:
        with zipfile.ZipFile(file) as directory:
            infos, limit = directory.infolist(), directory.start_dir
    except zipfile.BadZipFile as error:
        raise MediaError(
            f"{archive} is not a complete zip archive ({error}); copy it again, and join split downloads first"
        ) from error
    # A member extends to the header of the next one, and the last member to the central directory.
    ends = dict.fromkeys(sorted({info.header_offset for info in infos}), limit)
    for start, following in zip(list(ends), list(ends)[1:], strict=False):
        ends[start] = following
    for info in infos:
        # Flag 0x800 stands for UTF-8; without it zipfile has decoded cp437, which is lossless.
        raw = info.orig_filename.encode("utf-8" if info.flag_bits & 0x800 else "cp437", "surrogateescape")
        name = decode_name(raw, is_utf8=bool(info.flag_bits & 0x800))
        if not info.is_dir() and "\0" not in name:
            method = ENCRYPTED if info.flag_bits & 0x1 else min(info.compress_type, ENCRYPTED - 1)
            start, end = info.header_offset, ends[info.header_offset]
            yield name, MemberSpan(start, end, info.compress_size, info.file_size, info.CRC, method)


def _tar_spans(archive: str, file: BinaryIO) -> Iterable[tuple[str, MemberSpan]]:
    head = file.read(6)
    file.seek(0)
    compression = next((name for magic, name in _COMPRESSED.items() if head.startswith(magic)), None)
    if compression:
        raise _compressed_tar(archive, compression)
    try:
        with tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="surrogateescape") as tar:
            while (info := tar.next()) is not None:
                cast("Any", tar).members.clear()  # tarfile keeps all of them, a kilobyte each
                name = decode_name(info.name.encode("utf-8", "surrogateescape"), is_utf8=True)
                if info.isreg() and not info.issparse() and "\0" not in name:
                    start, size = info.offset_data, info.size
                    # Members of a tar have no checksum and no compression.
                    yield name, MemberSpan(start, start + size, size, size, 0, zipfile.ZIP_STORED)
            file.seek(tar.offset)
    except tarfile.TarError as error:
        raise MediaError(f"{archive} is not a complete tar archive ({error}); copy it again") from error
    if any(file.read(tarfile.BLOCKSIZE)):  # tarfile treats a damaged header as the end
        raise MediaError(f"{archive} is damaged at byte {tar.offset}; copy it again")


def decode_name(raw: bytes, *, is_utf8: bool) -> str:
    """Decodes the name of a member.

    Korean Windows writes cp949 and macOS UTF-8, both without setting a zip's flag, where the standard implies cp437.
    The name is decoded as UTF-8 if that is valid and has Hangul, else as cp949 if that has Hangul, else as valid UTF-8,
    else as cp437.
    """
    if raw.isascii():
        return raw.decode()
    readings = {encoding: _decode(raw, encoding) for encoding in ("utf-8", "cp949", "cp437")}
    if is_utf8 and readings["utf-8"] is not None:
        return readings["utf-8"]
    hangul = (readings[encoding] for encoding in ("utf-8", "cp949") if _HANGUL.search(readings[encoding] or ""))
    # cp437 has a character for each byte.
    return next(hangul, None) or readings["utf-8"] or readings["cp437"] or ""


def _decode(raw: bytes, encoding: str) -> str | None:
    try:
        return raw.decode(encoding)
    except UnicodeDecodeError:
        return None


def _compressed_tar(archive: str, compression: str) -> MediaError:
    return MediaError(
        f"{archive} is compressed ({compression}), so its members cannot be reached one by one; unpack it, or pack it "
        "again without compression (tar -cf), as videos and images are compressed already"
    )
