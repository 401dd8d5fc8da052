"""Who uses a store of features.

Files in its folder that processes on one or more machines lock and keep fresh, as `vlmcap.locks` does.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import time
from pathlib import Path

from filelock import BaseFileLock, Timeout

from vlmcap.locks import NO_LOCKS, file_lock, is_here, process_name

USERS = ".users"
"""Folder of the leases in that of a store."""

_STAMP = "used"
_RENEW_S = 300.0
_EXPIRE_S = 1800.0
_LEASE_TIMEOUT_S = 2.0  # others hold a lease for as long as it takes to see that it is free


class Lease:
    """This process's sign in the folder of a store that it is in use, which eviction respects.

    A read-only folder does without.

    Args:
        folder: Folder of the store.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._renewed: tuple[int, float] = (0, 0.0)

    def renew(self) -> None:
        """Say that the store is in use; cheap enough for each read."""
        pid, now = self._renewed
        if pid == os.getpid() and time.monotonic() - now < _RENEW_S:
            return
        path = self.folder / USERS / process_name()
        with contextlib.suppress(OSError):
            path.parent.mkdir(exist_ok=True)
            if not path.exists():  # the first time, or a machine that did not hear of us for long has removed it
                _hold(path)
            path.touch()
            (self.folder / _STAMP).touch()
        self._renewed = (os.getpid(), time.monotonic())


_leases: dict[Path, BaseFileLock] = {}  # of this process and those that it was forked from


def _hold(path: Path) -> None:
    if path not in _leases:
        atexit.register(_end, path, os.getpid())
    _leases[path] = file_lock(path, _LEASE_TIMEOUT_S)
    with contextlib.suppress(OSError):  # without locks the time of the file has to do
        _leases[path].acquire()


def _end(path: Path, pid: int) -> None:
    if os.getpid() == pid:
        with contextlib.suppress(OSError):
            path.unlink()


def is_alive(lease: Path) -> bool:
    """Whether the process of a lease lives: it locks it, or if it is another machine's has renewed it in half an hour.

    Else it goes.
    """
    with contextlib.suppress(OSError):
        is_late = time.time() - lease.stat().st_mtime > _EXPIRE_S
        if is_here(lease.name):
            try:
                with file_lock(lease):
                    lease.unlink()
                return False
            except Timeout:
                return True
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
        if not is_late:
            return True
        lease.unlink()
    return False


def is_in_use(folder: Path) -> bool:
    """Whether a living process has the store open."""
    try:
        leases = sorted((folder / USERS).iterdir())
    except OSError:
        return False
    return any([is_alive(lease) for lease in leases])  # a list: each that is dead goes


def last_used(folder: Path) -> float:
    """Seconds since 1970 when the store was used last."""
    for path in (folder / _STAMP, folder):
        with contextlib.suppress(OSError):
            return path.stat().st_mtime
    return 0.0
