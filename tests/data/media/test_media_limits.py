"""Files and members that are strange, damaged or made to harm are refused in a sentence, and never give other bytes."""

from __future__ import annotations

import os
import struct
import zipfile
import zlib
from pathlib import Path

import fsspec
import pytest

from vlmcap.data import media
from vlmcap.data.media import MediaError, open_media, read_text, stat_media
from vlmcap.data.media.storage import open_file

pytestmark = pytest.mark.usefixtures("fresh_store")


def test_what_is_no_regular_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.mp4")
    for address, reason in (
        (tmp_path / "pipe.mp4", "not a regular file"),  # opening it would wait for ever
        ("/dev/zero", "not a regular file"),
        (tmp_path, "not a regular file"),
        (tmp_path / "missing.mp4", "does not exist"),
        ("a\0b.mp4", "cannot be read"),
        ("memory://bucket/missing.mp4", "does not exist"),
        (f"zip://a::{tmp_path}/missing.zip", "does not exist"),
    ):
        with pytest.raises(MediaError, match=reason):
            open_media(str(address))
        with pytest.raises(MediaError, match=reason):
            stat_media(str(address))
    with pytest.raises(MediaError, match="not a regular file"):
        open_file(str(tmp_path / "pipe.mp4"))


def test_a_member_that_grows_too_much_is_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as writing:
        writing.writestr("a.mp4", b"\0" * 30_000_000)
        writing.writestr("back.txt", "behind")
    archive = tmp_path / "a.zip"
    with pytest.raises(MediaError, match="expands more than 200 times"):
        open_media(f"zip://a.mp4::{archive}")
    monkeypatch.setattr(media, "MAX_MEMBER_BYTES", 20_000_000)
    with pytest.raises(MediaError, match="limited to 20000000"):
        open_media(f"zip://a.mp4::{archive}")
    assert read_text(f"zip://back.txt::{archive}") == "behind"


def _change_zip(path: Path, *, central: dict[int, bytes] | None = None, local: dict[int, bytes] | None = None) -> Path:
    """Overwrites fields of the first member: in its central entry and its local header, by offset."""
    data = bytearray(path.read_bytes())
    for signature, changes in ((b"PK\1\2", central), (b"PK\3\4", local)):
        start = data.index(signature)
        for offset, value in (changes or {}).items():
            data[start + offset : start + offset + len(value)] = value
    path.write_bytes(bytes(data))
    return path


def test_a_size_that_is_a_lie_makes_no_more_bytes_than_it_says(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a", b"\0" * 50_000_000)
    _change_zip(tmp_path / "a.zip", central={24: struct.pack("<I", 1000)})
    with pytest.raises(MediaError, match="damaged"):
        open_media(f"zip://a::{tmp_path / 'a.zip'}")


def test_damage_in_a_compressed_member_is_told(tmp_path: Path) -> None:
    text = " ".join(str(number) for number in range(3000))
    for position, reason in ((60, "damaged"), (2000, "damaged")):
        with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("a.txt", text)
        data = bytearray((tmp_path / "a.zip").read_bytes())
        data[position] ^= 0x55
        (tmp_path / "a.zip").write_bytes(bytes(data))
        with pytest.raises(MediaError, match=reason):
            read_text(f"zip://a.txt::{tmp_path / 'a.zip'}")


@pytest.mark.parametrize(
    ("central", "local", "reason"),
    [
        ({8: b"\1\0"}, {6: b"\1\0"}, "is encrypted"),
        ({10: b"\x0c\0"}, {8: b"\x0c\0"}, "compressed by method 12"),
        ({10: b"\x63\0"}, {8: b"\x63\0"}, "compressed by method 99"),
        ({24: struct.pack("<I", 8)}, {}, "two sizes differ"),
        ({20: struct.pack("<II", 400, 400)}, {}, "overlaps with its neighbour"),
        ({}, {0: b"PK\7\7"}, "not where the archive's directory says"),
        ({}, {28: b"\xff\xff"}, "overlaps with its neighbour"),
    ],
)
@pytest.mark.parametrize("place", ["disk", "store"])
def test_strange_members_are_refused(
    tmp_path: Path, central: dict[int, bytes], local: dict[int, bytes], reason: str, place: str
) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a.mp4", b"content")
        archive.writestr("b.mp4", b"other")
    path = _change_zip(tmp_path / "a.zip", central=central, local=local)
    fsspec.filesystem("memory").pipe("/bucket/a.zip", path.read_bytes())
    base = str(path) if place == "disk" else "memory://bucket/a.zip"
    with pytest.raises(MediaError, match=reason):
        open_media(f"zip://a.mp4::{base}")
    assert open_media(f"zip://b.mp4::{base}").read() == b"other"


def test_overlapping_members_do_not_make_a_small_archive_endless(tmp_path: Path) -> None:
    kernel = zlib.compress(b"\0" * 900_000, 9)[2:-4]
    crc, size = zlib.crc32(b"\0" * 900_000), 900_000
    body, directory = b"", b""
    for number in range(20):  # each local header is also the beginning of the content of the one before
        name = b"%02d.mp4" % number
        packed = len(kernel) + (19 - number) * (30 + 6)
        sizes = (crc, packed, size, len(name), 0)
        directory += struct.pack("<4s6H3I5H2I", b"PK\1\2", 20, 20, 0, 8, 0, 0, *sizes, 0, 0, 0, 0, len(body)) + name
        body += struct.pack("<4s5H3I2H", b"PK\3\4", 20, 0, 8, 0, 0, *sizes) + name
    end = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 20, 20, len(directory), len(body) + len(kernel), 0)
    (tmp_path / "a.zip").write_bytes(body + kernel + directory + end)
    for number in range(19):
        with pytest.raises(MediaError, match="overlaps"):
            open_media(f"zip://{number:02d}.mp4::{tmp_path / 'a.zip'}")
    assert len(open_media(f"zip://19.mp4::{tmp_path / 'a.zip'}").read()) == size
