"""Files and folders that appear whole or not at all.

Both are written in a work folder beside their place, `.NAME.MACHINE-TOKEN.partial`, whose lock ends with its process,
however that ends. So whoever writes next into the same parent can tell what dead processes have left from what living
ones write, and removes the former.
"""

from __future__ import annotations

import contextlib
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

with contextlib.suppress(ImportError):  # Windows, where the age of a work folder has to do
    import fcntl

_LOCK = "lock"
_STALE_S = (
    24 * 3600.0
)  # of a work folder whose lock says nothing here: another machine's, or one on a file system without locks
_PARTIAL = re.compile(r"\..+\.(?P<machine>[0-9A-Za-z]+)-[0-9a-f]{8}\.partial")


@lru_cache(maxsize=1)
def machine_name() -> str:
    """Hexadecimal digits or letters for this boot of this machine, equal in all of its containers, which share its locks."""
    try:
        name = Path("/proc/sys/kernel/random/boot_id").read_text()
    except OSError:  # without Linux the host name has to do
        name = socket.gethostname()
    return "".join(letter for letter in name if letter.isalnum())[:12]


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write a file to; it takes the place of `path` when the block ends well, and is removed when it does not."""
    with work_folder(path) as folder:
        yield folder / path.name
        os.replace(folder / path.name, path)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to write into; it takes the name `path`, which may be an empty folder, when the block ends well, else it is removed."""
    with work_folder(path) as folder:
        (folder / path.name).mkdir()
        yield folder / path.name
        os.rename(folder / path.name, path)


@contextmanager
def work_folder(path: Path) -> Iterator[Path]:
    """A folder of this process alone beside `path`, for what will be moved there; it is removed when the block ends."""
    remove_leftovers(path.parent)
    folder, lock = _make(path)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def remove_leftovers(parent: Path) -> None:
    """Remove the work folders in `parent` whose processes are dead.

    One of this machine goes at once; another machine's, and any where the file system has no locks, when it has not
    changed for a day.
    """
    with contextlib.suppress(OSError), os.scandir(parent) as entries:
        for entry in entries:
            if match := _PARTIAL.fullmatch(entry.name):
                with contextlib.suppress(OSError):
                    _remove_if_dead(Path(entry.path), is_here=match["machine"] == machine_name())


def _make(path: Path) -> tuple[Path, int]:
    """A locked work folder, and the descriptor of its lock."""
    while True:
        folder = path.with_name(f".{path.name}.{machine_name()}-{secrets.token_hex(4)}.partial")
        folder.mkdir()
        with contextlib.suppress(
            FileNotFoundError
        ):  # it was free for a moment, in which another process has removed it: try again
            lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT)
            if _try_lock(lock) is not False and (folder / _LOCK).exists():
                return folder, lock
            os.close(lock)


def _try_lock(descriptor: int) -> bool | None:
    """Whether the lock is ours now; None where there are no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (OSError, NameError):
        return None
    return True


def _remove_if_dead(folder: Path, *, is_here: bool) -> None:
    changed = max(place.stat().st_mtime for place in (folder, *folder.iterdir()))
    is_stale = time.time() - changed > _STALE_S
    if not (folder / _LOCK).exists():  # just being made, or just being removed
        if is_stale:
            shutil.rmtree(folder, ignore_errors=True)
        return
    lock = os.open(folder / _LOCK, os.O_RDWR)
    try:
        is_free = _try_lock(lock)
        if (is_free and is_here) or (is_free is not False and is_stale):
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(lock)
