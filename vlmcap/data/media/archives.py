"""What is in a zip or tar archive and where: names, sizes and positions, read once and kept small.

Nothing is ever unpacked to disk, so a member's name is a key and no path: `..`, a leading `/` or a backslash in it lead
nowhere.
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

from vlmcap.data.media.storage import MediaError, explained, open_file

ENCRYPTED = 0xFFFF
"""Stands for the method of encrypted members."""

_HANGUL = re.compile(r"[\uac00-\ud7a3\u1100-\u11ff\u3131-\u318e]")
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_ROW = np.dtype(
    [("start", "<i8"), ("end", "<i8"), ("packed", "<i8"), ("size", "<i8"), ("crc", "<u4"), ("method", "<u2")]
)


class Member(NamedTuple):
    """A file in an archive; `size` is in bytes, after decompression."""

    name: str
    size: int


class Place(NamedTuple):
    """Where a member lies: bytes `start` to `end` hold it and, in a zip, its local header.

    `packed` bytes of them are the content.
    """

    start: int
    end: int
    packed: int
    size: int
    crc: int
    method: int


@dataclass(frozen=True, eq=False)
class ArchiveIndex(Sequence[Member]):
    """The regular files of an archive in the order of the archive; of two with one name, the last.

    Attributes:
        kind: "zip" or "tar".
        version: Of the archive, as `MediaStat` has it.
        names: Of the members.
        rows: Their places, a structured array.
    """

    kind: str
    version: str
    names: list[str]
    rows: NDArray[np.void]

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
        return Member(self.names[key], int(self.rows["size"][key]))

    def find(self, name: str) -> Place | None:
        """Where the member lies, or None."""
        positions = cast("dict[str, int]", self._positions)  # type: ignore[attr-defined]
        position = positions.get(name)
        return None if position is None else Place(*self.rows[position].item())


def kind_of(archive: str) -> str:
    """The kind of an archive by its name: "zip" or "tar".

    Raises:
        MediaError: It is neither, or a compressed tar, in which a member can only be reached by reading all before it.
    """
    suffixes = [suffix.lower() for suffix in PurePosixPath(archive).suffixes[-2:]]
    if suffixes[-1:] in ([".zip"], [".tar"]):
        return suffixes[-1][1:]
    if suffixes[:1] == [".tar"] or suffixes[-1:] in ([".tgz"], [".tbz2"], [".txz"], [".tzst"]):
        raise _compressed_tar(archive, suffixes[-1][1:])
    raise MediaError(f"{archive} is no archive that is read in place: name a .zip or an uncompressed .tar")


def read_index(archive: str, kind: str, version: str) -> ArchiveIndex:
    """The index of an archive, read from its central directory (zip) or its headers (tar).

    Raises:
        MediaError: It cannot be read, is no such archive, is damaged, or is a compressed tar.
    """
    with explained(archive), open_file(archive) as file:
        latest = dict(_zip_rows(archive, file) if kind == "zip" else _tar_rows(archive, file))
    names = list(latest)
    return ArchiveIndex(kind, version, names, np.array([tuple(place) for place in latest.values()], dtype=_ROW))


def _zip_rows(archive: str, file: BinaryIO) -> Iterable[tuple[str, Place]]:
    try:
        with zipfile.ZipFile(file) as directory:
            infos, limit = directory.infolist(), directory.start_dir
    except zipfile.BadZipFile as error:
        raise MediaError(
            f"{archive} is no whole zip archive ({error}): copy it again, and join split downloads first"
        ) from error
    ends = dict.fromkeys(sorted({info.header_offset for info in infos}), limit)
    for start, following in zip(list(ends), list(ends)[1:], strict=False):
        ends[start] = following
    for info in infos:
        # Flag 0x800 says UTF-8; without it zipfile has decoded cp437, which loses nothing.
        raw = info.orig_filename.encode("utf-8" if info.flag_bits & 0x800 else "cp437", "surrogateescape")
        name = decode_name(raw, is_utf8=bool(info.flag_bits & 0x800))
        if not info.is_dir() and "\0" not in name:
            method = ENCRYPTED if info.flag_bits & 0x1 else min(info.compress_type, ENCRYPTED - 1)
            yield (
                name,
                Place(
                    info.header_offset, ends[info.header_offset], info.compress_size, info.file_size, info.CRC, method
                ),
            )


def _tar_rows(archive: str, file: BinaryIO) -> Iterable[tuple[str, Place]]:
    head = file.read(6)
    file.seek(0)
    compression = next((name for magic, name in _COMPRESSED.items() if head.startswith(magic)), None)
    if compression:
        raise _compressed_tar(archive, compression)
    try:
        with tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="surrogateescape") as tar:
            while (info := tar.next()) is not None:
                cast("Any", tar).members.clear()  # tarfile keeps them all, a kilobyte each
                name = decode_name(info.name.encode("utf-8", "surrogateescape"), is_utf8=True)
                if info.isreg() and not info.issparse() and "\0" not in name:
                    yield (
                        name,
                        Place(
                            info.offset_data, info.offset_data + info.size, info.size, info.size, 0, zipfile.ZIP_STORED
                        ),
                    )
            file.seek(tar.offset)
    except tarfile.TarError as error:
        raise MediaError(f"{archive} is no whole tar archive ({error}): copy it again") from error
    if any(file.read(tarfile.BLOCKSIZE)):  # tarfile takes a damaged header for the end
        raise MediaError(f"{archive} is damaged at byte {tar.offset}: copy it again")


def decode_name(raw: bytes, *, is_utf8: bool) -> str:
    """The name of a member, out of the bytes in the archive.

    Korean Windows writes cp949 and macOS UTF-8, both without saying so in a zip's flag, where the standard means cp437.
    UTF-8 is taken where it is valid and has Hangul, cp949 where that gives Hangul, then any valid UTF-8, and cp437 for
    the rest.
    """
    if raw.isascii():
        return raw.decode()
    readings = {encoding: _decode(raw, encoding) for encoding in ("utf-8", "cp949", "cp437")}
    if is_utf8 and readings["utf-8"] is not None:
        return readings["utf-8"]
    hangul = (readings[encoding] for encoding in ("utf-8", "cp949") if _HANGUL.search(readings[encoding] or ""))
    # cp437 has a character for each byte
    return next(hangul, None) or readings["utf-8"] or readings["cp437"] or ""


def _decode(raw: bytes, encoding: str) -> str | None:
    try:
        return raw.decode(encoding)
    except UnicodeDecodeError:
        return None


def _compressed_tar(archive: str, compression: str) -> MediaError:
    return MediaError(
        f"{archive} is compressed ({compression}), so that its members cannot be reached one by one: unpack it, or "
        "pack it again without "
        "compression (tar -cf); videos and images are compressed already"
    )
