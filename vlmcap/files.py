"""Writes files and folders atomically.

Both are written to a work folder beside their target, `.NAME.MACHINE-TOKEN.partial`, which is locked by its process.
The lock ends with the process, so the next process that writes to the same parent removes the folders of dead processes
and keeps those of running ones.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

with contextlib.suppress(ImportError):  # Windows has no fcntl; there, only the age of a work folder decides
    import fcntl

_LOCK = "lock"
# Age of a work folder without a meaningful lock: one of another machine, or on a file system without locks.
_STALE_S = 24 * 3600.0
# Matches ".config.yaml.3f2a9c01b7de-1a2b3c4d.partial", the name that `_make` gives.
_PARTIAL = re.compile(r"\..+\.(?P<machine>[0-9A-Za-z]+)-[0-9a-f]{8}\.partial")


@lru_cache(maxsize=1)
def machine_name() -> str:
    """Returns letters and digits that identify this boot of this machine; its containers share name and locks."""
    try:
        name = Path("/proc/sys/kernel/random/boot_id").read_text()
    except OSError:  # not on Linux
        name = socket.gethostname()
    return "".join(letter for letter in name if letter.isalnum())[:12]


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a path to write to, which replaces `path` at the end of the block, or is removed if the block raises."""
    with work_folder(path) as folder:
        # The partial file has the name of its target, as some writers choose the format by the ending.
        yield folder / path.name
        # On the same file system, so the rename is atomic.
        os.replace(folder / path.name, path)


def write_text(path: Path, text: str) -> None:
    """Writes a text file in UTF-8 atomically."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON file atomically."""
    write_text(path, json.dumps(content, ensure_ascii=False, indent=2) + "\n")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yields a folder to write to, which becomes `path` at the end of the block, or is removed if the block raises.

    `path` may be an empty folder.
    """
    with work_folder(path) as folder:
        (folder / path.name).mkdir()
        yield folder / path.name
        # Fails if the folder exists and is not empty.
        os.rename(folder / path.name, path)


@contextmanager
def work_folder(path: Path) -> Iterator[Path]:
    """Yields a locked folder of this process beside `path`, and removes it at the end of the block."""
    remove_leftovers(path.parent)
    folder, lock = _make(path)
    try:
        yield folder
    finally:
        # Removed before the lock is closed, so that nobody else finds an unlocked folder.
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def remove_leftovers(parent: Path) -> None:
    """Removes the work folders in `parent` whose processes are dead.

    A folder of this machine is removed immediately. A folder of another machine, or on a file system without locks, is
    removed if it has not changed for a day.
    """
    with contextlib.suppress(OSError), os.scandir(parent) as entries:
        for entry in entries:
            if match := _PARTIAL.fullmatch(entry.name):
                with contextlib.suppress(OSError):
                    _remove_if_dead(Path(entry.path), is_here=match["machine"] == machine_name())


def _make(path: Path) -> tuple[Path, int]:
    """Makes a locked work folder, and returns it with the descriptor of its lock."""
    while True:
        folder = path.with_name(f".{path.name}.{machine_name()}-{secrets.token_hex(4)}.partial")
        folder.mkdir()
        # Another process may remove the folder before it is locked: try again.
        with contextlib.suppress(FileNotFoundError):
            lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT)
            # The lock must be on a file that is still in the folder, and not on a removed one.
            if _try_lock(lock) is not False and (folder / _LOCK).exists():
                return folder, lock
            os.close(lock)


def _try_lock(descriptor: int) -> bool | None:
    """Returns whether this process has acquired the lock; None if there are no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    # NameError: there is no fcntl on Windows.
    except (OSError, NameError):
        return None
    return True


def _remove_if_dead(folder: Path, *, is_here: bool) -> None:
    # The youngest of folder and files.
    changed = max(path.stat().st_mtime for path in (folder, *folder.iterdir()))
    is_stale = time.time() - changed > _STALE_S
    if not (folder / _LOCK).exists():  # another process is creating or removing it
        if is_stale:
            shutil.rmtree(folder, ignore_errors=True)
        return
    lock = os.open(folder / _LOCK, os.O_RDWR)
    try:
        is_free = _try_lock(lock)
        # Here, a free lock means a dead process. On another machine a lock may not be seen, so age decides as well.
        if (is_free and is_here) or (is_free is not False and is_stale):
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(lock)
