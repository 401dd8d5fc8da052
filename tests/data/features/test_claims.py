"""One process at a time has a claim; a claim whose owner is gone is free."""

from __future__ import annotations

import multiprocessing
import os
import time
from pathlib import Path

from vlmcap.data.features.claims import Claims
from vlmcap.data.features.processes import is_dead, machine_name, process_name


def take_and_die(folder: Path) -> None:
    claims = Claims(folder, 100)
    claims.__enter__()
    assert claims.take("a")
    os._exit(9)


def dead_owner(folder: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=take_and_die, args=(folder,))
    process.start()
    process.join(30)
    assert process.exitcode == 9


def test_a_claim_has_one_owner_until_it_is_given_back(tmp_path: Path) -> None:
    with Claims(tmp_path / "c", 100) as first, Claims(tmp_path / "c", 100) as second:
        assert first.take("a")
        assert not second.take("a")
        assert second.take("b")
        first.release(["a"])
        assert second.take("a")
    assert not (tmp_path / "c").exists()


def test_claims_are_given_back_after_an_error(tmp_path: Path) -> None:
    try:
        with Claims(tmp_path / "c", 100) as claims:
            assert claims.take("a")
            raise RuntimeError
    except RuntimeError:
        pass
    with Claims(tmp_path / "c", 100) as claims:
        assert claims.take("a")


def test_the_claim_of_a_dead_process_is_free_at_once(tmp_path: Path) -> None:
    dead_owner(tmp_path)
    assert is_dead((tmp_path / "a").read_text())
    with Claims(tmp_path, 1000) as claims:
        assert claims.take("a")
        assert (tmp_path / "a").read_text() == process_name()


def test_the_claim_of_another_machine_is_free_when_it_stands_still(tmp_path: Path) -> None:
    owner = f"{'0' * 8}-1"
    assert not is_dead(owner)
    (tmp_path / "a").write_text(owner)
    os.utime(tmp_path / "a", (0, 0))  # its clock is decades behind: what counts is whether the time moves
    with Claims(tmp_path, 0.2) as claims:
        for _ in range(6):
            assert not claims.take("a")
            time.sleep(0.05)
            os.utime(tmp_path / "a", (_, _))
        assert not claims.take("a")
        time.sleep(0.25)
        assert claims.take("a")


def test_a_held_claim_moves(tmp_path: Path) -> None:
    with Claims(tmp_path, 0.08) as claims:
        assert claims.take("a")
        os.utime(tmp_path / "a", (0, 0))
        deadline = time.monotonic() + 10
        while not (tmp_path / "a").stat().st_mtime and time.monotonic() < deadline:
            time.sleep(0.005)
        assert (tmp_path / "a").stat().st_mtime > 1


def test_what_a_process_is_called() -> None:
    assert not is_dead(process_name())
    assert process_name() == f"{machine_name()}-{os.getpid()}"
    for odd in ("", "-", machine_name(), f"{machine_name()}-x", f"{machine_name()}-{10**30}"):
        assert not is_dead(odd)
