"""A hash follows the content of a file and nothing else, and no file is read for it twice."""

from __future__ import annotations

import multiprocessing
import os
import time
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest

from vlmcap.data.features import content_hash as content
from vlmcap.data.features.content_hash import UNREADABLE, content_hashes
from vlmcap.types import Clip

FORK = multiprocessing.get_context("fork")


def clip(path: Path | str, *frames: Path) -> Clip:
    return Clip(Path(str(path)).stem, str(path), ("글",), frames=tuple(map(str, frames)))


def one(path: Path | str, memo: Path) -> bytes:
    return bytes(content_hashes([clip(path)], memo)[0])


@pytest.mark.parametrize("size", [0, 10, 1024 * 1024, 3 * 1024 * 1024])
def test_the_hash_follows_the_content(tmp_path: Path, size: int) -> None:
    path, memo = tmp_path / "x.mp4", tmp_path / "memo.sqlite"
    path.write_bytes(bytes(size))
    first = one(path, memo)
    assert len(first) == 32
    os.utime(path, (0, 0))
    assert one(path, memo) == first
    for changed in (bytes(size + 1), b"x" + bytes(size), bytes(max(0, size - 1)) + b"x"):
        path.write_bytes(changed)
        assert one(path, memo) != first
    path.rename(tmp_path / "y.mp4")
    assert one(path, memo) == UNREADABLE
    assert one(tmp_path / "y.mp4", memo) == one(tmp_path / "y.mp4", tmp_path / "other.sqlite") != first


def test_a_member_of_an_archive_has_the_hash_of_the_file(tmp_path: Path) -> None:
    path, archive = tmp_path / "x.mp4", tmp_path / "a.zip"
    path.write_bytes(os.urandom(3 * 1024 * 1024))
    with zipfile.ZipFile(archive, "w") as file:
        file.write(path, "in/x.mp4")
    assert one(f"zip://in/x.mp4::{archive}", tmp_path / "memo") == one(path, tmp_path / "memo") != UNREADABLE
    assert one(f"zip://in/y.mp4::{archive}", tmp_path / "memo") == UNREADABLE
    assert one("zip://nonsense", tmp_path / "memo") == UNREADABLE


def test_a_clip_of_images_is_all_of_them_in_order(tmp_path: Path) -> None:
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    for i, path in enumerate(paths):
        path.write_bytes(bytes([i]))
    memo = tmp_path / "memo"
    lists = [paths, paths[::-1], paths[:2], [*paths[:2], paths[0]], paths]
    hashes = content_hashes([clip(frames[0], *frames) for frames in lists] + [clip(paths[0])], memo)
    assert len(set(hashes.tolist())) == 5
    assert hashes[0] == hashes[4]
    paths[1].unlink()
    assert content_hashes([clip(paths[0], *paths)], memo)[0] == UNREADABLE


def test_captions_and_ids_do_not_count(small_clips: list[Clip], tmp_path: Path) -> None:
    others = [Clip(f"x{i}", str(given.video), ("다른 글",)) for i, given in enumerate(small_clips)]
    given = [Clip(item.id, str(item.video), item.captions) for item in small_clips]
    assert (content_hashes(given, tmp_path / "memo") == content_hashes(others, tmp_path / "memo")).all()


def test_a_file_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [tmp_path / f"{i}.mp4" for i in range(2500)]
    for i, path in enumerate(paths):
        path.write_bytes(str(i).encode())
    memo, seen, read = tmp_path / "deep" / "memo.sqlite", [], []
    clips = [clip(path) for path in [*paths, tmp_path / "none.mp4"]]
    first = content_hashes(clips, memo, lambda done, total: seen.append((done, total)))
    assert seen == [(1024, 2501), (2048, 2501), (2501, 2501)]
    assert len(set(first.tolist())) == 2501 and first[-1] == UNREADABLE
    plain = content.media_hash

    def count(address: str, stat: object) -> str:
        read.append(address)
        return plain(address, stat)  # type: ignore[arg-type]

    monkeypatch.setattr(content, "media_hash", count)
    paths[7].write_bytes(b"changed")
    monkeypatch.chdir(tmp_path)
    again = content_hashes(
        [clip(path.name) for path in paths] + [clips[-1]], memo
    )  # relative to another folder: the same files
    assert [Path(address).name for address in read] == ["7.mp4"]
    assert np.flatnonzero(again != first).tolist() == [7]


@pytest.mark.parametrize("damage", ["a folder", "no folder", "other table"])
def test_a_memo_that_cannot_be_used_costs_time_only(tmp_path: Path, damage: str) -> None:
    path, memo = tmp_path / "x.mp4", tmp_path / "memo"
    path.write_bytes(b"x")
    if damage == "a folder":
        memo.mkdir()
    elif damage == "no folder":
        memo.write_bytes(b"")
        memo = memo / "memo"
    else:
        import sqlite3

        with sqlite3.connect(memo) as base:
            base.execute("CREATE TABLE hashes (a TEXT)")
    with pytest.warns(
        UserWarning, match="cannot be used .*, so all videos are read for their hashes each time"
    ) as warned:
        assert one(path, memo) == one(path, tmp_path / "other")
    assert len(warned) == 1


def hash_all(clips: list[Clip], memo: Path) -> None:
    content_hashes(clips, memo)


def test_processes_share_a_memo(tmp_path: Path) -> None:
    paths = [tmp_path / f"{i}.mp4" for i in range(300)]
    for i, path in enumerate(paths):
        path.write_bytes(str(i).encode())
    memo, clips = tmp_path / "memo", [clip(path) for path in paths]
    children = [FORK.Process(target=hash_all, args=(clips, memo)) for _ in range(4)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0] * 4
    assert len(set(content_hashes(clips, memo).tolist())) == 300


def test_a_damaged_memo_is_made_again_and_gives_no_wrong_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths, memo = [tmp_path / f"{i}.mp4" for i in range(8)], tmp_path / "memo"
    for path in paths:
        path.write_bytes(path.name.encode())
    clips = [clip(path) for path in paths]
    expected = content_hashes(clips, memo).tolist()
    whole = memo.read_bytes()
    for position in [*range(0, 100, 9), *range(100, len(whole), 31)]:
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        memo.write_bytes(bytes(damaged))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert content_hashes(clips, memo).tolist() == expected, position
    for damaged in (os.urandom(5000), whole[: len(whole) // 2]):
        memo.write_bytes(damaged)
        assert content_hashes(clips, memo).tolist() == expected
        with monkeypatch.context() as patch:
            patch.setattr(content, "media_hash", None)
            assert content_hashes(clips, memo).tolist() == expected, "it is remembered again"


@pytest.mark.parametrize("size", [10, 3 * 1024 * 1024])
@pytest.mark.parametrize("how", ["replaced", "in place", "by a hard link"])
def test_a_clip_of_equal_name_size_and_time_is_seen(tmp_path: Path, size: int, how: str) -> None:
    path, memo = tmp_path / "x.mp4", tmp_path / "memo"
    path.write_bytes(b"a" * size)
    times = path.stat()
    first = one(path, memo)
    if how == "in place":
        time.sleep(0.02)  # longer than a tick of the file system's clock
        path.write_bytes(b"b" * size)
    else:
        other = tmp_path / "other"
        other.write_bytes(b"b" * size)
        path.unlink()
        other.rename(path) if how == "replaced" else os.link(other, path)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (times.st_size, times.st_mtime_ns)
    assert one(path, memo) not in (first, UNREADABLE)
