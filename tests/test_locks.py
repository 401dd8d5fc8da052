"""One process at a time has a claim; a claim whose owner is gone is free."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from vlmcap import locks
from vlmcap.errors import InUseError, UserError
from vlmcap.locks import Claims, claimed_folder, is_here, living_owner, machine_name, process_name, remove_free_claims

FORK = multiprocessing.get_context("fork")
ELSEWHERE = f"{'0' * 8}-1"
LONG_S = 1000.0


def take_and_die(folder: Path) -> None:
    claims = Claims(folder, LONG_S)
    claims.__enter__()
    assert claims.take("a")
    os._exit(9)


def die_before_the_claim_has_its_mark(folder: Path) -> None:
    locks.process_name = lambda: os._exit(9)
    Claims(folder, LONG_S).take("a")


def leave_a_child_and_die(folder: Path) -> None:
    claims = Claims(folder, LONG_S)
    claims.__enter__()
    assert claims.take("a")
    child = os.fork()
    if child == 0:
        time.sleep(30)
        os._exit(0)
    (folder.parent / "child").write_text(str(child))
    os._exit(9)


@pytest.mark.parametrize("die", [take_and_die, die_before_the_claim_has_its_mark, leave_a_child_and_die])
def test_the_claim_of_a_dead_process_is_free_at_once(tmp_path: Path, die: Callable[[Path], None]) -> None:
    folder = tmp_path / "c"
    folder.mkdir()
    pid = os.fork()
    if pid == 0:
        die(folder)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # it has ended, and its parent has not asked for its status yet
    try:
        assert (folder / "a").exists()
        taker = Claims(folder, LONG_S)
        assert taker.take("a")
        assert (folder / "a").read_text().startswith(f"{process_name()}\n")
    finally:
        os.waitpid(pid, 0)
        if (tmp_path / "child").exists():
            os.kill(int((tmp_path / "child").read_text()), 9)


def test_a_claim_has_one_owner_until_it_is_given_back(tmp_path: Path) -> None:
    with Claims(tmp_path / "c", 100) as first, Claims(tmp_path / "c", 100) as second:
        assert first.take("a")
        assert not second.take("a")
        assert second.take("b")
        first.release(["a"])
        assert second.take("a")
    assert not (tmp_path / "c").exists()


def test_claims_are_given_back_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), Claims(tmp_path / "c", 100) as claims:
        assert claims.take("a")
        raise RuntimeError
    with Claims(tmp_path / "c", 100) as claims:
        assert claims.take("a")


def test_what_the_dead_left_is_removed_and_claims_of_the_living_are_not(tmp_path: Path) -> None:
    child = FORK.Process(target=take_and_die, args=(tmp_path,))
    child.start()
    child.join(30)
    assert child.exitcode == 9
    (tmp_path / "b").write_text(ELSEWHERE)
    with Claims(tmp_path, LONG_S) as claims:
        assert claims.take("c")
        remove_free_claims(tmp_path)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "c"]
    (tmp_path / "b").unlink()
    remove_free_claims(tmp_path)
    assert not tmp_path.exists()
    remove_free_claims(tmp_path)
    assert not tmp_path.exists()


@pytest.mark.parametrize("has_lock", [False, True])
def test_the_claim_of_another_machine_is_free_when_it_stands_still(tmp_path: Path, has_lock: bool) -> None:
    """With a lock, as a file server shows it that has not heard of the machine's death, and without."""
    lock = locks.file_lock(tmp_path / "a")
    if has_lock:
        lock.acquire()
    (tmp_path / "a").write_text(ELSEWHERE)
    os.utime(tmp_path / "a", (0, 0))  # its clock is decades behind: what counts is whether the time moves
    taker = Claims(tmp_path, 0.2)
    for tick in range(6):
        assert not taker.take("a")
        time.sleep(0.05)
        os.utime(tmp_path / "a", (tick, tick))
    assert not taker.take("a")
    time.sleep(0.25)
    assert taker.take("a")
    assert not Claims(tmp_path, 0.2).take("a")


def test_a_held_claim_moves(tmp_path: Path) -> None:
    with Claims(tmp_path, 0.08) as holder:
        assert holder.take("a")
        os.utime(tmp_path / "a", (0, 0))
        deadline = time.monotonic() + 10
        while not (tmp_path / "a").stat().st_mtime and time.monotonic() < deadline:
            time.sleep(0.005)
        assert (tmp_path / "a").stat().st_mtime > 1


def test_without_locks_the_times_of_the_files_decide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    with Claims(tmp_path / "c", 100) as first, Claims(tmp_path / "c", 100) as second:
        assert first.take("a")
        assert not second.take("a")
        first.release(["a"])
        assert second.take("a")


def test_what_a_process_is_called() -> None:
    machine, token = process_name().split("-")
    assert machine == machine_name() and token and process_name() == process_name()
    assert is_here(process_name()) and not is_here(ELSEWHERE) and not is_here("")
    with FORK.Pool(1) as pool:
        assert pool.apply(process_name) not in (process_name(), ELSEWHERE)


# --- a folder that one program at a time may write to -----------------------------------------------------------------


def hold(folder: Path, started: Any, end: Any) -> None:
    with claimed_folder(folder, "paths.output_dir"):
        started.set()
        end.wait(60)


@pytest.fixture
def held(tmp_path: Path) -> Iterator[tuple[Path, Any]]:
    """A folder that a living process holds, and the process."""
    folder, started, end = tmp_path / "run", FORK.Event(), FORK.Event()
    child = FORK.Process(target=hold, args=(folder, started, end))
    child.start()
    assert started.wait(30)
    yield folder, child
    child.kill()  # setting an event waits for ever for a process that was killed while it waited
    child.join(30)


def test_a_folder_in_use_is_refused_in_one_sentence_that_names_the_owner(held: tuple[Path, Any]) -> None:
    folder, child = held
    with pytest.raises(InUseError) as refused, claimed_folder(folder, "paths.output_dir"):
        pass
    sentence = str(refused.value)
    assert sentence.startswith(
        f"paths.output_dir={folder} is in use by process {child.pid} on {socket.gethostname()} since "
    )
    assert Path(sys.argv[0]).name in sentence and "choose another folder" in sentence and "\n" not in sentence
    assert living_owner(folder) == refused.value.owner
    assert isinstance(refused.value, UserError)


def test_the_folder_of_a_killed_process_is_free_at_once(held: tuple[Path, Any]) -> None:
    folder, child = held
    os.kill(child.pid, signal.SIGKILL)
    child.join(30)
    assert list((folder / ".claims").iterdir())
    started = time.monotonic()
    with claimed_folder(folder, "paths.output_dir"):
        (folder / "x").touch()
    assert time.monotonic() - started < 10 and os.listdir(folder) == ["x"]


def test_a_process_holds_a_folder_twice_and_its_forks_do_not(tmp_path: Path) -> None:
    with claimed_folder(tmp_path / "run", "x"):
        with claimed_folder(tmp_path / "run", "x"):
            pass
        with FORK.Pool(1) as pool:
            assert pool.apply(living_owner, (tmp_path / "run",)) is not None
    assert living_owner(tmp_path / "run") is None
    assert os.listdir(tmp_path) == []  # nothing was written


def test_after_an_error_the_folder_is_free(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), claimed_folder(tmp_path / "run", "x"):
        (tmp_path / "run" / "kept").touch()
        raise RuntimeError
    assert os.listdir(tmp_path / "run") == ["kept"]


def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written to"), claimed_folder(tmp_path / "file", "x"):
        pass


def claim_from_elsewhere(folder: Path) -> Path:
    """The claim of a process on another machine."""
    claim = folder / ".claims" / "run"
    claim.parent.mkdir(parents=True)
    claim.write_text(f"{ELSEWHERE}\nprocess 1 on node7 since yesterday (train.py)")
    return claim


def test_the_folder_of_a_dead_machine_is_free_after_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(locks, "_STALE_S", 0.5)
    claim_from_elsewhere(tmp_path)
    with claimed_folder(tmp_path, "paths.output_dir"):
        (tmp_path / "x").touch()
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "node7" in said and "waiting to see whether it is still running" in said


def test_the_folder_of_another_living_machine_is_refused(tmp_path: Path) -> None:
    claim, ended = claim_from_elsewhere(tmp_path), threading.Event()

    def live() -> None:
        for tick in range(10_000):
            os.utime(claim, (tick, tick))  # its clock is decades behind
            if ended.wait(0.05):
                return

    thread = threading.Thread(target=live)
    thread.start()
    try:
        with (
            pytest.raises(InUseError, match="in use by process 1 on node7"),
            claimed_folder(tmp_path, "paths.output_dir"),
        ):
            pass
    finally:
        ended.set()
        thread.join()


def test_without_locks_a_living_process_is_seen_by_its_beats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    monkeypatch.setattr(locks, "_STALE_S", 2.0)  # a beat each quarter of a second
    with claimed_folder(tmp_path, "x"):
        monkeypatch.setattr(locks, "_owned", {})  # as in another process
        with pytest.raises(InUseError), claimed_folder(tmp_path, "x"):
            pass
        locks._owned[tmp_path] = os.getpid()
