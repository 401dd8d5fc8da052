"""One process at a time has a claim; a claim whose owner is gone is free."""

from __future__ import annotations

import errno
import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from vlmcap.data.features import leases as claims
from vlmcap.data.features.leases import Lease, is_alive, is_in_use
from vlmcap.locks import Claims, is_here, machine_name, process_name, remove_free_claims

FORK = multiprocessing.get_context("fork")
ELSEWHERE = f"{'0' * 8}-1"
LONG_S = 1000.0


def take_and_die(folder: Path) -> None:
    claims = Claims(folder, LONG_S)
    claims.__enter__()
    assert claims.take("a")
    os._exit(9)


def die_before_the_claim_has_its_mark(folder: Path) -> None:
    claims.process_name = lambda: os._exit(9)
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
        assert (folder / "a").read_text() == process_name()
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
    lock = claims._lock(tmp_path / "a")
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
    lease = Lease(tmp_path)
    lease.renew()
    assert is_in_use(tmp_path)
    os.utime(tmp_path / ".users" / process_name(), (0, 0))
    assert not is_in_use(tmp_path)


def test_a_lease_lasts_as_long_as_its_process(tmp_path: Path) -> None:
    child = FORK.Process(target=renew_and_die, args=(tmp_path,))
    child.start()
    child.join(30)
    assert child.exitcode == 9
    (dead,) = (tmp_path / ".users").iterdir()
    assert is_here(dead.name) and not is_alive(dead) and not dead.exists()
    lease = Lease(tmp_path)
    lease.renew()
    (own,) = (tmp_path / ".users").iterdir()
    assert is_alive(own) and own.name == process_name()
    own.unlink()  # as a machine does that has not heard of this one for long
    Lease(tmp_path).renew()
    assert is_alive(own)


def renew_and_die(folder: Path) -> None:
    Lease(folder).renew()
    os._exit(9)


def test_what_a_process_is_called() -> None:
    machine, token = process_name().split("-")
    assert machine == machine_name() and token and process_name() == process_name()
    assert is_here(process_name()) and not is_here(ELSEWHERE) and not is_here("")
    with FORK.Pool(1) as pool:
        assert pool.apply(process_name) not in (process_name(), ELSEWHERE)
