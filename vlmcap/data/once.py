"""Folders that are made once, and are there whole or not at all."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from vlmcap.files import new_folder

_TIMEOUT_S = 600.0  # a file server may count the lock of a machine that died for ever; then a folder may be made twice


def make_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """`folder`, filled by `make` unless it is there; of several processes one makes it and the others wait.

    A broken or killed making leaves nothing half-written under its name, and what it left beside it goes with the next.

    Args:
        folder: Its parents are made.
        make: Called with an empty folder to fill.
    """
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.with_name(f".{folder.name}.lock"), _TIMEOUT_S, fallback_to_soft=False)
    with contextlib.suppress(OSError):  # it took too long, or the file system has no locks
        lock.acquire()
    try:
        if folder.is_dir():  # another process was faster
            return folder
        with new_folder(folder) as partial:
            make(partial)
    except OSError:
        if not folder.is_dir():  # made twice, where the lock did not hold
            raise
    finally:
        if lock.is_locked:
            Path(lock.lock_file).unlink(missing_ok=True)
            lock.release()
    return folder
