"""A store is in use as long as a living process has a lease of it."""

from __future__ import annotations

import errno
import multiprocessing
import os
from pathlib import Path

import pytest

from vlmcap.data.features.leases import Lease, is_alive, is_in_use
from vlmcap.locks import is_here, process_name

FORK = multiprocessing.get_context("fork")


def test_a_lease_lasts_as_long_as_its_process(tmp_path: Path) -> None:
    child = FORK.Process(target=renew_and_die, args=(tmp_path,))
    child.start()
    child.join(30)
    assert child.exitcode == 9
    (dead,) = (tmp_path / ".users").iterdir()
    assert is_here(dead.name) and not is_alive(dead) and not dead.exists()
    lease = Lease(tmp_path)
    lease.renew()
    (lease,) = (tmp_path / ".users").iterdir()
    assert is_alive(lease) and lease.name == process_name()
    lease.unlink()  # as a machine does that has not heard of this one for long
    Lease(tmp_path).renew()
    assert is_alive(lease)


def renew_and_die(folder: Path) -> None:
    Lease(folder).renew()
    os._exit(9)


def test_without_locks_the_times_of_the_leases_decide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    lease = Lease(tmp_path)
    lease.renew()
    assert is_in_use(tmp_path)
    os.utime(tmp_path / ".users" / process_name(), (0, 0))
    assert not is_in_use(tmp_path)
