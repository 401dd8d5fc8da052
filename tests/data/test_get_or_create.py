"""A folder is created one time by the fastest process, and an attempt that fails or is killed leaves nothing valid."""

from __future__ import annotations

import errno
import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

import pytest

from vlmcap.data import get_or_create as once
from vlmcap.data.get_or_create import get_or_create
from vlmcap.errors import UserError

FORK = multiprocessing.get_context("fork")


def make_slowly(folder: Path, log: Path, start: Any) -> None:
    def make(target: Path) -> None:
        with log.open("a") as file:
            file.write("made\n")
        time.sleep(0.2)
        (target / "x").write_text("whole")

    start.wait(30)
    assert (get_or_create(folder, make) / "x").read_text() == "whole"


def test_processes_make_a_folder_once(tmp_path: Path) -> None:
    folder, log, start = tmp_path / "parents" / "made", tmp_path / "log", FORK.Event()
    children = [FORK.Process(target=make_slowly, args=(folder, log, start)) for _ in range(3)]
    for child in children:
        child.start()
    start.set()
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0, 0, 0]
    assert log.read_text() == "made\n"
    assert os.listdir(folder.parent) == ["made"]


def test_a_killed_making_is_made_again_at_once(tmp_path: Path) -> None:
    def die(target: Path) -> None:
        (target / "x").write_text("half")
        os._exit(9)

    child = FORK.Process(target=get_or_create, args=(tmp_path / "made", die))
    child.start()
    child.join(30)
    assert child.exitcode == 9 and not (tmp_path / "made").exists()
    made = get_or_create(tmp_path / "made", lambda target: (target / "y").touch())
    assert os.listdir(made) == ["y"] and os.listdir(tmp_path) == ["made"]


def test_a_making_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def fail(target: Path) -> None:
        (target / "x").touch()
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        get_or_create(tmp_path / "made", fail)
    assert os.listdir(tmp_path) == []


def test_a_folder_is_made_where_there_are_no_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    made = get_or_create(tmp_path / "made", lambda target: (target / "x").touch())
    assert os.listdir(made) == ["x"]


def test_who_waits_says_for_whom_and_not_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    begun, end = FORK.Event(), FORK.Event()

    def make(target: Path) -> None:
        begun.set()
        end.wait(60)

    child = FORK.Process(target=get_or_create, args=(tmp_path / "made", make))
    child.start()
    assert begun.wait(30)
    monkeypatch.setattr(once, "_WAIT_S", 0.5)
    with pytest.raises(
        UserError, match=rf"made is being made by process {child.pid} .*after 0 s of waiting; start again when it"
    ):
        get_or_create(tmp_path / "made", lambda target: None)
    said = capsys.readouterr().err
    assert (
        f"made is being made by process {child.pid} " in said
        and said.endswith("; waiting for it\n")
        and said.count("\n") == 1
    )
    end.set()
    child.join(30)
    assert child.exitcode == 0 and os.listdir(tmp_path) == ["made"]
