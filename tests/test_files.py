"""Files and folders appear whole, and what dead writers left goes while what living ones write stays."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from vlmcap.data.get_or_create import get_or_create
from vlmcap.data.manifest import TableWriter
from vlmcap.files import new_folder, replacing
from vlmcap.types import Clip

FORK = multiprocessing.get_context("fork")
DAY_S = 24 * 3600


@contextmanager
def table(path: Path) -> Iterator[Path]:
    with TableWriter(path.parent) as writer:
        writer.add(Clip("a", "a.mp4", ("글",)))
        yield path


def write_text(partial: Path) -> None:
    partial.write_text("half")


def write_tensors(partial: Path) -> None:
    save_file({"a": torch.zeros(3)}, partial)  # which makes a file of its own and renames it


def write_members(partial: Path) -> None:
    (partial / "member").write_text("half")


WRITERS: dict[str, tuple[Callable[[Path], AbstractContextManager[Path]], Callable[[Path], object]]] = {
    "a file": (replacing, write_text),
    "a file of a library that renames": (replacing, write_tensors),
    "a folder": (new_folder, write_members),
    "a table": (table, lambda _: None),
}


def start(kind: str, path: Path, end: Callable[[Any], object]) -> Any:
    """A process that has written half, and then does `end` with an event that nobody sets."""
    written = FORK.Event()

    def write() -> None:
        make, fill = WRITERS[kind]
        with make(path) as partial:
            fill(partial)
            written.set()
            end(FORK.Event())

    child = FORK.Process(target=write)
    child.start()
    assert written.wait(60)
    return child


def partials(folder: Path) -> list[Path]:
    return list(folder.glob(".*.partial"))


@pytest.mark.parametrize("name", ["last.ckpt", "another.ckpt"])
@pytest.mark.parametrize("kind", WRITERS)
def test_what_a_killed_writer_left_goes_with_the_next_write(tmp_path: Path, kind: str, name: str) -> None:
    child = start(kind, tmp_path / "last.ckpt", lambda event: event.wait(60))
    child.kill()
    child.join()
    assert len(partials(tmp_path)) == 1
    with replacing(tmp_path / name) as partial:
        partial.write_text("whole")
    assert not partials(tmp_path) and (tmp_path / name).read_text() == "whole"


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("is_stopped", [False, True])
def test_what_a_living_writer_writes_stays(tmp_path: Path, kind: str, is_stopped: bool) -> None:
    child = start(kind, tmp_path / "last.ckpt", lambda event: event.wait(60))
    if is_stopped:
        os.kill(child.pid, signal.SIGSTOP)
    (theirs,) = partials(tmp_path)
    os.utime(theirs, (time.time() - 3 * DAY_S,) * 2)
    before = {str(place) for place in theirs.rglob("*")}
    try:
        with replacing(tmp_path / "last.ckpt") as partial:
            partial.write_text("ours")
        assert partials(tmp_path) == [theirs] and {str(place) for place in theirs.rglob("*")} == before
    finally:
        child.kill()
        child.join()


def write_often(path: Path, text: str) -> None:
    for _ in range(100):
        with replacing(path) as partial:
            partial.write_text(text * 1000)
        assert path.read_text() in ("a" * 1000, "b" * 1000)


def test_two_writers_at_once_leave_one_whole_file(tmp_path: Path) -> None:
    children = [FORK.Process(target=write_often, args=(tmp_path / "file", text)) for text in "ab"]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0, 0]
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize(
    ("machine", "has_locks"), [("0123456789ab", True), (None, False)], ids=["another machine", "no locks"]
)
def test_where_a_lock_says_nothing_the_age_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, machine: str | None, has_locks: bool
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    child = start("a file", tmp_path / "file", lambda event: event.wait(60))
    child.kill()
    child.join()
    (left,) = partials(tmp_path)
    if machine is not None:
        left = left.rename(tmp_path / f".file.{machine}-00000000.partial")
    if not has_locks:
        monkeypatch.setattr("fcntl.flock", refuse)
    for age_s, is_there in ((0, True), (DAY_S - 100, True), (DAY_S + 100, False)):
        for place in (*left.iterdir(), left):
            os.utime(place, (time.time() - age_s,) * 2)
        with replacing(tmp_path / "file") as partial:
            partial.write_text("whole")
        assert left.exists() == is_there


def test_files_of_others_stay(tmp_path: Path) -> None:
    names = {".video.mp4.partial", ".file.1234.partial", "file.0123456789ab-00000000.partial", ".cache"}
    for name in names:
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (time.time() - 9 * DAY_S,) * 2)
    with replacing(tmp_path / "file") as partial:
        partial.touch()
    assert {path.name for path in tmp_path.iterdir()} == names | {"file"}


@pytest.mark.parametrize("kind", WRITERS)
def test_a_block_that_fails_leaves_nothing_and_the_old_content(tmp_path: Path, kind: str) -> None:
    make, fill = WRITERS[kind]
    (tmp_path / "file").mkdir() if make is new_folder else (tmp_path / "file").write_text("old")
    with pytest.raises(KeyboardInterrupt), make(tmp_path / "file") as partial:
        fill(partial)
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == ["file"]
    assert not list((tmp_path / "file").iterdir()) if make is new_folder else (tmp_path / "file").read_text() == "old"


def test_a_folder_that_is_made_once_cleans_up_too(tmp_path: Path) -> None:
    child = start("a folder", tmp_path / "made", lambda event: event.wait(60))
    child.kill()
    child.join()
    get_or_create(tmp_path / "made", lambda folder: (folder / "x").touch())
    assert os.listdir(tmp_path) == ["made"]
