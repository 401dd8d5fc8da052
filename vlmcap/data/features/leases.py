"""Signs that a store is in use, which eviction respects, and when it was used last, which eviction goes by."""

from __future__ import annotations

import atexit
import contextlib
import os
import time
from pathlib import Path

from vlmcap.data.features.processes import is_dead, is_here, process_name

_FOLDER = ".users"
_STAMP = "used"
_RENEW_S = 300.0
_EXPIRE_S = 1800.0


class Lease:
    """This process's sign in the folder of a store; a folder that cannot be written does without.

    Args:
        folder: Of the store.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._renewed: tuple[int, float] = (0, 0.0)

    def renew(self) -> None:
        """Say that the store is in use; cheap enough for each read."""
        pid, now = self._renewed
        if pid == os.getpid() and time.monotonic() - now < _RENEW_S:
            return
        path = self.folder / _FOLDER / process_name()
        with contextlib.suppress(OSError):
            path.parent.mkdir(exist_ok=True)
            path.touch()
            (self.folder / _STAMP).touch()
            if pid != os.getpid():  # a fork has its parent's lease but none of its own
                atexit.register(_end, path, os.getpid())
        self._renewed = (os.getpid(), time.monotonic())


def _end(path: Path, pid: int) -> None:
    if os.getpid() == pid:
        with contextlib.suppress(OSError):
            path.unlink()


def is_in_use(folder: Path) -> bool:
    """Whether a living process has the store open: for sure on this machine; on others, one that renewed its lease in half an hour."""
    is_used = False
    with contextlib.suppress(OSError):
        for path in (folder / _FOLDER).iterdir():
            is_late = not is_here(path.name) and time.time() - path.stat().st_mtime > _EXPIRE_S
            if is_late or is_dead(path.name):
                path.unlink()
            else:
                is_used = True
    return is_used


def last_used(folder: Path) -> float:
    """Seconds since 1970 when the store was used last."""
    for path in (folder / _STAMP, folder):
        with contextlib.suppress(OSError):
            return path.stat().st_mtime
    return 0.0
