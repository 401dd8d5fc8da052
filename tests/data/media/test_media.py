"""Media are opened by address, in place, from disk and object storage, and nothing that harms is."""

from __future__ import annotations

import io
import os
import pickle
import tarfile
import zipfile
from pathlib import Path

import av
import fsspec
import numpy as np
import pytest

from vlmcap.data import media
from vlmcap.data.media import MediaError, local_path, member_address, open_media, parse_address, read_text, stat_media
from vlmcap.data.media.storage import list_files

CONTENT = np.random.default_rng(0).bytes(100_000)


pytestmark = pytest.mark.usefixtures("fresh_store")


def write_zip(path: Path, method: int = zipfile.ZIP_STORED, content: bytes = CONTENT) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("front.txt", "in front")
        archive.writestr("폴더/영상.mp4", content)
        archive.writestr("back.txt", "behind")
    return path


def write_tar(path: Path, content: bytes = CONTENT) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in (("front.txt", b"in front"), ("폴더/영상.mp4", content), ("back.txt", b"behind")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def everywhere(folder: Path, content: bytes = CONTENT) -> list[str]:
    """Addresses of the same content: plain, stored, deflated and in a tar; on disk and in an object store."""
    (folder / "영상.mp4").write_bytes(content)
    write_zip(folder / "stored.zip", content=content)
    write_zip(folder / "deflated.zip", zipfile.ZIP_DEFLATED, content)
    write_tar(folder / "a.tar", content)
    store = fsspec.filesystem("memory")
    for path in folder.iterdir():
        store.pipe(f"/bucket/{path.name}", path.read_bytes())
    addresses = []
    for base in (str(folder), f"file://{folder}", "memory://bucket"):
        addresses.append(f"{base}/영상.mp4")
        addresses += [
            member_address(f"{base}/{name}", "폴더/영상.mp4") for name in ("stored.zip", "deflated.zip", "a.tar")
        ]
    return addresses


# --- addresses --------------------------------------------------------------------------------------------------------


def test_parts_of_an_address() -> None:
    assert parse_address("clips/a.mp4") == ("", "", "clips/a.mp4")
    assert parse_address("zip://폴더/a.mp4::s3://bucket/b.zip") == ("zip", "폴더/a.mp4", "s3://bucket/b.zip")
    assert parse_address("tar://a::b.mp4::/data/b.tar") == ("tar", "a::b.mp4", "/data/b.tar")
    assert member_address("s3://bucket/B.ZIP", "a.mp4") == "zip://a.mp4::s3://bucket/B.ZIP"


def test_only_plain_local_files_have_a_path(tmp_path: Path) -> None:
    assert local_path(f"{tmp_path}/a.mp4") == tmp_path / "a.mp4"
    assert local_path(f"file://{tmp_path}/a.mp4") == tmp_path / "a.mp4"
    assert local_path("memory://a.mp4") is None
    assert local_path(f"zip://a.mp4::{tmp_path}/a.zip") is None


@pytest.mark.parametrize(
    "address",
    [
        "ssh://host/a.mp4",
        "ftp://host/a.mp4",
        "github://org:repo@main/a.mp4",
        "jupyter://a",
        "simplecache::memory://a.mp4",
        "filecache::s3://bucket/a.mp4",
        "s3://bucket/a.mp4::simplecache://",
        "zip://a.mp4::zip://b.zip::c.zip",
        "zip://a.mp4::tar://b.zip::c.tar",
        "zip://a.mp4::ssh://host/c.zip",
        "zip://a.mp4::simplecache::ssh://host/c.zip",
        "zip://a.mp4",
        "zip://::a.zip",
        "tar://a::",
        "reference://::x.json",
        "dir://x::file:///etc",
    ],
)
def test_other_addresses_are_refused_in_one_sentence(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fsspec, "filesystem", lambda *_, **__: pytest.fail("fsspec was asked"))
    for call in (open_media, stat_media, read_text):
        with pytest.raises(MediaError) as caught:
            call(address)
        assert "\n" not in str(caught.value)


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(protocol: str) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec, "filesystem", refuse)
    with pytest.raises(
        MediaError,
        match=r"s3://bucket/a\.mp4 needs a package that is not installed \(Install s3fs to access S3\); install",
    ):
        open_media("s3://bucket/a.mp4")


# --- reading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("whole_read_bytes", [0, 64 * 1024**2])  # remote ranges as wanted, or all at once
def test_the_same_bytes_from_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole_read_bytes: int) -> None:
    monkeypatch.setattr(media, "WHOLE_READ_BYTES", whole_read_bytes)
    addresses = everywhere(tmp_path)
    assert len(addresses) == 12
    for address in addresses:
        assert stat_media(address).size == len(CONTENT), address
        with open_media(address) as file:
            assert file.readable() and file.seekable(), address
            assert file.read() == CONTENT, address
            assert file.read() == b""
            for position in (99_990, 5, 70_000, 0):
                assert file.seek(position) == position
                assert file.read(20) == CONTENT[position : position + 20], address
            assert file.seek(-7, os.SEEK_END) == len(CONTENT) - 7
            assert file.read() == CONTENT[-7:], address
            file.seek(10)
            file.seek(5, os.SEEK_CUR)
            assert (file.tell(), file.read(1)) == (15, CONTENT[15:16])
            assert file.seek(len(CONTENT) + 5) and file.read() == b""


def test_a_window_is_no_copy_and_closes_its_file(tmp_path: Path) -> None:
    for address in (
        f"zip://폴더/영상.mp4::{write_zip(tmp_path / 'a.zip')}",
        f"tar://폴더/영상.mp4::{write_tar(tmp_path / 'a.tar')}",
    ):
        opened = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").is_dir() else None
        file = open_media(address)
        assert not isinstance(file, io.BytesIO)
        file.close()
        if opened is not None:
            assert len(os.listdir("/proc/self/fd")) == opened


def test_a_real_clip_decodes_alike_from_everywhere(tmp_path: Path, real_clips: dict[str, Path]) -> None:
    clip = real_clips["bikes"].read_bytes()

    def frames(address: str) -> list[bytes]:
        with open_media(address) as file, av.open(file) as container:
            container.seek(3_000_000)
            decoded = container.decode(video=0)
            return [next(decoded).to_ndarray(format="gray").tobytes() for _ in range(3)]

    expected = frames(str(real_clips["bikes"]))
    for address in everywhere(tmp_path, clip):
        assert frames(address) == expected, address


def test_a_remote_member_is_one_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    addresses = [address for address in everywhere(tmp_path) if "::memory" in address]
    for address in addresses:
        stat_media(address)  # the index is there
    asked: list[tuple[int, int]] = []
    original = media.read_range

    def counting(place: str, start: int, end: int) -> bytes:
        asked.append((start, end))
        return original(place, start, end)

    monkeypatch.setattr(media, "read_range", counting)
    monkeypatch.setattr(media, "open_file", lambda *_: pytest.fail("opened as well"))
    for address in addresses:
        open_media(address).read()
    assert len(addresses) == len(asked) == 3
    assert all(end - start < len(CONTENT) + 1000 for start, end in asked)


def test_a_version_changes_with_the_content(tmp_path: Path) -> None:
    store = fsspec.filesystem("memory")
    store.pipe("/bucket/a.mp4", b"first")
    (tmp_path / "a.mp4").write_bytes(b"first")
    before = [stat_media(address) for address in ("memory://bucket/a.mp4", str(tmp_path / "a.mp4"))]
    assert before == [stat_media(address) for address in ("memory://bucket/a.mp4", str(tmp_path / "a.mp4"))]
    store.pipe("/bucket/a.mp4", b"other")
    (tmp_path / "a.mp4").write_bytes(b"other")
    os.utime(tmp_path / "a.mp4", ns=(1, 1))
    after = [stat_media(address) for address in ("memory://bucket/a.mp4", str(tmp_path / "a.mp4"))]
    assert [stat.size for stat in after] == [5, 5]
    assert all(a.version != b.version for a, b in zip(before, after, strict=True))
    assert pickle.loads(pickle.dumps(after)) == after  # it travels between processes


def test_files_are_listed_by_pattern(tmp_path: Path) -> None:
    store = fsspec.filesystem("memory")
    for name in ("b-1.tar", "b-0.tar", "c.txt", "deep/b-2.tar"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
        store.pipe(f"/bucket/{name}", b"")
    (tmp_path / "b-9.tar").mkdir()
    assert list_files(f"{tmp_path}/b-*.tar") == [f"{tmp_path}/b-0.tar", f"{tmp_path}/b-1.tar"]
    assert list_files(f"{tmp_path}/**/b-?.tar")[-1] == f"{tmp_path}/deep/b-2.tar"
    assert list_files("memory://bucket/b-*.tar") == ["memory://bucket/b-0.tar", "memory://bucket/b-1.tar"]


def test_text_is_utf8_with_or_without_a_mark(tmp_path: Path) -> None:
    (tmp_path / "marked.json").write_bytes(b"\xef\xbb\xbf" + "바다".encode())
    assert read_text(str(tmp_path / "marked.json")) == "바다"
    for encoding, hint in (("cp949", "cp949"), ("utf-16", "UTF-16")):
        (tmp_path / "a.json").write_bytes("바다 위로 해가 뜬다".encode(encoding))
        with pytest.raises(MediaError, match=f"not UTF-8 text.*{hint}"):
            read_text(str(tmp_path / "a.json"))
    (tmp_path / "long.json").write_bytes(b"x" * 101)
    assert len(read_text(str(tmp_path / "long.json"), max_bytes=101)) == 101
    with pytest.raises(MediaError, match="more than 100 bytes"):
        read_text(str(tmp_path / "long.json"), max_bytes=100)
