"""Archives are indexed where they lie, names of Korean machines are read, and archives made to harm are refused."""

from __future__ import annotations

import io
import multiprocessing
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from vlmcap.data.media import (
    MediaError,
    archive_cache,
    list_members,
    member_address,
    open_media,
    read_text,
    stat_media,
    use_index_folder,
)
from vlmcap.data.media.archives import ArchiveIndex, decode_name


@pytest.fixture(autouse=True)
def fresh_cache(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(archive_cache, "_indices", {})
    yield
    use_index_folder(None)


def write_raw_zip(path: Path, members: list[tuple[bytes, bytes]], *, flags: int = 0) -> Path:
    """A zip as other programs write it: the names are these very bytes."""
    body, directory = bytearray(), bytearray()
    for name, content in members:
        sizes = (zlib.crc32(content), len(content), len(content), len(name), 0)
        directory += struct.pack("<4s6H3I5H2I", b"PK\1\2", 20, 20, flags, 0, 0, 0, *sizes, 0, 0, 0, 0, len(body)) + name
        body += struct.pack("<4s5H3I2H", b"PK\3\4", 20, flags, 0, 0, 0, *sizes) + name + content
    end = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, len(members), len(members), len(directory), len(body), 0)
    path.write_bytes(bytes(body + directory + end))
    return path


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def names(archive: Path) -> list[str]:
    return [member.name for member in list_members(str(archive))]


# --- names ------------------------------------------------------------------------------------------------------------


def test_names_of_a_korean_windows_zip_are_hangul(tmp_path: Path) -> None:
    archive = write_raw_zip(
        tmp_path / "윈도.zip", [("영상/바다 풍경.txt".encode("cp949"), b"sea"), (b"plain.txt", b"p")]
    )
    with zipfile.ZipFile(archive) as plain:
        assert "영상/바다 풍경.txt" not in plain.namelist()  # what zipfile alone makes of it
    assert names(archive) == ["영상/바다 풍경.txt", "plain.txt"]
    assert read_text(f"zip://영상/바다 풍경.txt::{archive}") == "sea"


@pytest.mark.parametrize(
    "name", ["풍경.txt", "풍경.txt", "한/글.txt"]
)  # composed, decomposed as macOS writes it, short
def test_names_of_a_zip_in_utf8_without_the_flag(tmp_path: Path, name: str) -> None:
    assert names(write_raw_zip(tmp_path / "mac.zip", [(name.encode(), b"")])) == [name]


def test_names_of_other_bytes_stay_apart() -> None:
    assert decode_name("café.mp4".encode("cp437"), is_utf8=False) == "café.mp4"
    assert decode_name("횡.mp4".encode("cp949"), is_utf8=False) == "횡.mp4"  # its bytes are also valid UTF-8
    assert decode_name("é漢.mp4".encode(), is_utf8=True) == "é漢.mp4"
    every_byte = {decode_name(bytes([byte]), is_utf8=False) for byte in range(256)}
    assert len(every_byte) == 256


def test_a_tar_with_cp949_names(tmp_path: Path) -> None:
    archive = tmp_path / "a.tar"
    with tarfile.open(archive, "w", format=tarfile.GNU_FORMAT, encoding="cp949") as tar:
        tar.addfile(tarfile.TarInfo("풍경.mp4"), io.BytesIO())
    assert names(archive) == ["풍경.mp4"]


@pytest.mark.parametrize(
    "name", ["../../escaped.txt", "/etc/escaped.txt", "..\\escaped.txt", "C:\\escaped.txt", "a::b.txt"]
)
def test_a_name_is_a_key_and_leads_nowhere(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "deep" / "deeper"
    folder.mkdir(parents=True)
    write_raw_zip(folder / "a.zip", [(name.encode(), b"inside")], flags=0x800)
    write_tar(folder / "a.tar", {name: b"inside"})
    before = sorted(tmp_path.rglob("*"))
    for archive in (folder / "a.zip", folder / "a.tar"):
        assert names(archive) == [name]
        assert read_text(member_address(str(archive), name)) == "inside"
    assert sorted(tmp_path.rglob("*")) == before


# --- indices ----------------------------------------------------------------------------------------------------------


def test_a_zip_index_has_files_only_and_the_last_of_two(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.mkdir("folder")
        archive.writestr("folder/a.txt", "first")
        archive.writestr("b.txt", "b" * 5000, zipfile.ZIP_DEFLATED)
        archive.writestr("folder/a.txt", "second")
    assert list(list_members(str(tmp_path / "a.zip"))) == [("folder/a.txt", 6), ("b.txt", 5000)]
    assert read_text(f"zip://folder/a.txt::{tmp_path / 'a.zip'}") == "second"
    assert read_text(f"zip://b.txt::{tmp_path / 'a.zip'}") == "b" * 5000


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_tar_index_has_regular_files_only(tmp_path: Path, format: int) -> None:
    long_name = "폴더/" * 12 + "영상.txt"
    with tarfile.open(tmp_path / "a.tar", "w", format=format) as tar:
        for name, kind in (
            ("hard", tarfile.LNKTYPE),
            ("soft", tarfile.SYMTYPE),
            ("pipe", tarfile.FIFOTYPE),
            ("device", tarfile.CHRTYPE),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        folder = tarfile.TarInfo("폴더")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name in (long_name, "b.txt"):
            info = tarfile.TarInfo(name)
            info.size = 700
            tar.addfile(info, io.BytesIO(name[-5:].encode().ljust(700)))
    assert list(list_members(str(tmp_path / "a.tar"))) == [(long_name, 700), ("b.txt", 700)]
    assert read_text(f"tar://b.txt::{tmp_path / 'a.tar'}").strip() == "b.txt"
    with pytest.raises(MediaError, match="no member soft"):
        open_media(f"tar://soft::{tmp_path / 'a.tar'}")


def test_a_sparse_member_is_ignored(tmp_path: Path) -> None:
    info = tarfile.TarInfo("sparse")
    info.type = tarfile.GNUTYPE_SPARSE
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[483:495] = b"00000000001\0"  # the size it claims
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    (tmp_path / "a.tar").write_bytes(bytes(header) + b"\0" * 1024)
    assert names(tmp_path / "a.tar") == []


def test_an_empty_archive_has_no_members(tmp_path: Path) -> None:
    zipfile.ZipFile(tmp_path / "a.zip", "w").close()
    tarfile.open(tmp_path / "a.tar", "w").close()
    assert names(tmp_path / "a.zip") == names(tmp_path / "a.tar") == []


def test_slices_and_lengths_as_of_a_list(tmp_path: Path) -> None:
    index = list_members(str(write_tar(tmp_path / "a.tar", {f"{i}.txt": b"x" * i for i in range(5)})))
    assert len(index) == 5
    assert index[-1] == ("4.txt", 4)
    assert list(index[1:3]) == [("1.txt", 1), ("2.txt", 2)]


def test_a_changed_archive_is_read_again_and_another_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    original = archive_cache.read_index

    def counting(archive: str, kind: str, version: str) -> ArchiveIndex:
        read.append(archive)
        return original(archive, kind, version)

    monkeypatch.setattr(archive_cache, "read_index", counting)
    archive = write_tar(tmp_path / "a.tar", {"a.txt": b"old", "b.txt": b"b"})
    for _ in range(3):
        assert read_text(f"tar://a.txt::{archive}") == "old"
    old = stat_media(f"tar://a.txt::{archive}")
    assert len(read) == 1
    write_tar(archive, {"c.txt": b"in front", "a.txt": b"new, longer"})
    assert read_text(f"tar://a.txt::{archive}") == "new, longer"
    assert stat_media(f"tar://a.txt::{archive}").version != old.version
    assert len(read) == 2


def test_members_of_one_archive_differ_in_version(tmp_path: Path) -> None:
    archive = write_tar(tmp_path / "a.tar", {"a": b"12", "b": b"34"})
    a, b = (stat_media(f"tar://{name}::{archive}") for name in "ab")
    assert (a.size, b.size) == (2, 2)
    assert a.version != b.version


def test_old_indices_go_when_there_are_too_many_members(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive_cache, "_MAX_MEMBERS", 4)
    for name in "abc":
        list_members(str(write_tar(tmp_path / f"{name}.tar", {"1": b"", "2": b""})))
    assert [Path(key).name for key in archive_cache._indices] == ["b.tar", "c.tar"]


def test_an_index_on_disk_saves_reading_the_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_index_folder(tmp_path / "indices")
    archive = write_tar(tmp_path / "a.tar", {"영상 하나.txt": b"1", "b.txt": b"22"})
    before = list(list_members(str(archive)))
    archive_cache._indices.clear()
    with monkeypatch.context() as patch:
        patch.setattr(archive_cache, "read_index", lambda *_: pytest.fail("read again"))
        assert list(list_members(str(archive))) == before
        assert read_text(f"tar://b.txt::{archive}") == "22"
    write_tar(archive, {"new.txt": b"new"})
    assert names(archive) == ["new.txt"]
    archive_cache._indices.clear()
    for file in (tmp_path / "indices").iterdir():  # half a file, as of a full disk
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    assert names(archive) == ["new.txt"]


def test_an_empty_index_is_kept_on_disk(tmp_path: Path) -> None:
    use_index_folder(tmp_path / "indices")
    archive = write_tar(tmp_path / "a.tar", {})
    assert names(archive) == []
    archive_cache._indices.clear()
    assert names(archive) == []


@pytest.mark.slow
def test_an_index_is_small(tmp_path: Path) -> None:
    archive = write_raw_zip(tmp_path / "a.zip", [(b"%d" % number, b"") for number in range(20_000)])
    index = list_members(str(archive))
    assert isinstance(index, ArchiveIndex)
    assert index.spans.nbytes <= 40 * len(index)
    assert read_text(f"zip://19999::{archive}") == ""


def _read_in_child(addresses: list[str], queue: multiprocessing.Queue[list[bytes]]) -> None:
    queue.put([open_media(address).read() for address in addresses])


def test_processes_that_fork_do_not_move_each_others_position(tmp_path: Path) -> None:
    contents = {f"{i}.bin": np.random.default_rng(i).bytes(200_000) for i in range(4)}
    archive = write_tar(tmp_path / "a.tar", contents)
    addresses = [f"tar://{name}::{archive}" for name in contents]
    opened = open_media(addresses[0])
    first = opened.read(1000)
    context = multiprocessing.get_context("fork")
    queue: multiprocessing.Queue[list[bytes]] = context.Queue()
    children = [context.Process(target=_read_in_child, args=(addresses, queue)) for _ in range(2)]
    for child in children:
        child.start()
    answers = [queue.get(timeout=60) for _ in children]
    for child in children:
        child.join()
    assert answers == [list(contents.values())] * 2
    assert first + opened.read() == contents["0.bin"]


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "mode"), [("a.tar.gz", "w:gz"), ("a.tgz", "w:gz"), ("a.tar.xz", "w:xz"), ("gzip_inside.tar", "w:gz")]
)
def test_a_compressed_tar_is_refused_with_the_mend(tmp_path: Path, name: str, mode: str) -> None:
    with tarfile.open(tmp_path / name, mode) as tar:  # type: ignore[call-overload]
        tar.addfile(tarfile.TarInfo("a.txt"))
    with pytest.raises(MediaError, match="without compression"):
        list_members(str(tmp_path / name))
    with pytest.raises(MediaError, match="without compression"):
        open_media(f"tar://a.txt::{tmp_path / name}")


def test_another_kind_of_archive_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.7z").write_bytes(b"7z")
    (tmp_path / "a.zip").write_bytes(b"no zip")
    (tmp_path / "a.tar").write_bytes(b"no tar" * 1000)
    with pytest.raises(MediaError, match=r"use a \.zip or"):
        list_members(str(tmp_path / "a.7z"))
    with pytest.raises(MediaError, match="not a complete zip archive"):
        list_members(str(tmp_path / "a.zip"))
    with pytest.raises(MediaError, match="not a complete tar archive"):
        list_members(str(tmp_path / "a.tar"))


@pytest.mark.parametrize("suffix", [".zip", ".tar"])
def test_a_cut_archive_is_refused(tmp_path: Path, suffix: str) -> None:
    content = np.random.default_rng(0).bytes(50_000)
    if suffix == ".zip":
        archive = write_raw_zip(tmp_path / "a.zip", [(b"a", content), (b"b", content)])
    else:
        archive = write_tar(tmp_path / "a.tar", {"a": content, "b": content})
    archive.write_bytes(archive.read_bytes()[:80_000])
    with pytest.raises(MediaError, match="copy it again"):
        list_members(str(archive))


def test_a_damaged_header_in_the_middle_of_a_tar_is_not_taken_for_its_end(tmp_path: Path) -> None:
    archive = write_tar(tmp_path / "a.tar", {"a": b"1", "b": b"2", "c": b"3"})
    data = bytearray(archive.read_bytes())
    data[1024 + 100] ^= 0xFF
    archive.write_bytes(bytes(data))
    with pytest.raises(MediaError, match="damaged at byte 1024"):
        list_members(str(archive))
