"""Leases on a feature store, which show that it is in use.

They are files in its folder that processes on one or more machines lock and touch, as in `vlmcap.locks`.
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
"""Subfolder of a store that contains the leases."""

_STAMP = "used"
_RENEW_S = 300.0
_EXPIRE_S = 1800.0
_LEASE_TIMEOUT_S = 2.0  # other processes hold a lease only while they check whether it is free


class Lease:
    """Marks a store as used by this process, which eviction respects; a read-only folder has no lease.

    Args:
        folder: Folder of the store.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._renewed: tuple[int, float] = (0, 0.0)

    def renew(self) -> None:
        """Marks the store as in use; cheap enough to call at each read."""
        pid, now = self._renewed
        # A fork has another process id, and takes a lease of its own.
        if pid == os.getpid() and time.monotonic() - now < _RENEW_S:
            return
        path = self.folder / USERS / process_name()
        with contextlib.suppress(OSError):
            path.parent.mkdir(exist_ok=True)
            if not path.exists():  # first use, or removed by a machine that did not hear from this one for long
                _acquire(path)
            path.touch()
            (self.folder / _STAMP).touch()
        self._renewed = (os.getpid(), time.monotonic())


_leases: dict[Path, BaseFileLock] = {}  # of this process and of those it was forked from


def _acquire(path: Path) -> None:
    if path not in _leases:
        atexit.register(_remove_own, path, os.getpid())
    _leases[path] = file_lock(path, _LEASE_TIMEOUT_S)
    with contextlib.suppress(OSError):  # without file locks the modification time is used
        _leases[path].acquire()


def _remove_own(path: Path, pid: int) -> None:
    if os.getpid() == pid:
        with contextlib.suppress(OSError):
            path.unlink()


def is_alive(lease: Path) -> bool:
    """Returns whether the process of a lease is alive, and removes the lease if not.

    It is if it holds the lock, or, on another machine, if it has renewed the lease within half an hour.
    """
    with contextlib.suppress(OSError):
        is_late = time.time() - lease.stat().st_mtime > _EXPIRE_S
        if is_here(lease.name):
            try:
                # Its owner holds a lock as long as it lives, so a lock that can be taken means a dead one.
                with file_lock(lease):
                    lease.unlink()
                return False
            except Timeout:
                return True
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
        # A lease of another machine, or on a file system without locks.
        if not is_late:
            return True
        lease.unlink()
    return False


def is_in_use(folder: Path) -> bool:
    """Returns whether a living process has the store open."""
    try:
        leases = sorted((folder / USERS).iterdir())
    except OSError:
        return False
    return any([is_alive(lease) for lease in leases])  # a list, so that every dead lease is removed


def last_used(folder: Path) -> float:
    """Returns when the store was last used, in seconds since 1970."""
    for path in (folder / _STAMP, folder):
        with contextlib.suppress(OSError):
            return path.stat().st_mtime
    return 0.0
