"""Who works on what, and who uses what: files in a shared folder that processes on one or more machines lock and keep fresh.

A lock is the kernel's (flock): it ends with its process, however that ends, and cannot be left behind as a process number can. What a lock
does not reach beyond its machine for, the times of the files say: mounts that keep locks to themselves, and file servers that count the
locks of a machine that died. Nothing depends on a claim for its correctness: two processes with the same claim do the same work twice.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import math
import os
import secrets
import threading
import time
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from types import TracebackType

from filelock import BaseFileLock, FileLock, Timeout

from vlmcap.files import machine_name

CLAIMS = ".claims"
"""Folder of the claims in that of a store."""
USERS = ".users"
"""Folder of the leases in that of a store."""

_STAMP = "used"
_RENEW_S = 300.0
_EXPIRE_S = 1800.0
_LEASE_TIMEOUT_S = 2.0  # others hold a lease for as long as it takes to see that it is free
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


def process_name() -> str:
    """`machine-token` of this process: two names without hyphens, as a process number may be another's in a container or tomorrow."""
    return f"{machine_name()}-{_token(os.getpid())}"


def is_here(name: str) -> bool:
    """Whether a `process_name` is of this machine."""
    return name.partition("-")[0] == machine_name()


@lru_cache
def _token(pid: int) -> str:
    """Eight hexadecimal digits, others in a fork."""
    return secrets.token_hex(4)


def _lock(path: Path, timeout_s: float = 0.0) -> BaseFileLock:
    """A lock of this process, not of its thread or its forks, on a file that other users may lock too.

    The library's own way out on file systems without locks is not taken: it leaves files that nobody ever removes.
    """
    return FileLock(path, timeout_s, 0o666, thread_local=False, fallback_to_soft=False)


class Claims:
    """Claims of this process, in a context that gives them back at its end.

    A claim of a process that has ended on this machine is free at once. That of another machine is when the time of its file has stood
    still for `stale_s` by our own clock, as the clocks of two machines may differ.

    Args:
        folder: Folder of the claims; it is made here.
        stale_s: Seconds without a sign of life after which a claim is free.
    """

    def __init__(self, folder: Path, stale_s: float) -> None:
        self.folder, self.stale_s = folder, stale_s
        self._held: dict[str, BaseFileLock] = {}
        self._seen: dict[str, tuple[int, float]] = {}
        self._ended = threading.Event()
        self._pulse = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> Claims:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._pulse.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._ended.set()
        self.release(tuple(self._held))
        with contextlib.suppress(OSError):
            self.folder.rmdir()  # others' claims keep it

    def take(self, name: str) -> bool:
        """Whether the claim is ours now."""
        path, lock = self.folder / name, _lock(self.folder / name)
        with contextlib.suppress(OSError):
            if self._stands_still(path):
                path.unlink()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)  # the last process to leave removes it
            lock.acquire()
        except (Timeout, FileNotFoundError):
            return False
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        owner = path.read_text(errors="replace") if path.exists() else ""
        if owner and not (is_here(owner) and lock.is_locked):  # alive, as far as can be seen from here
            lock.release()
            return False
        path.write_text(process_name())
        self._held[name] = lock
        return True

    def release(self, names: Iterable[str]) -> None:
        """Give claims back."""
        for name in names:
            lock = self._held.pop(name)
            with contextlib.suppress(OSError):
                (self.folder / name).unlink()  # before the lock ends: whoever has opened the file meanwhile sees that it has gone
            lock.release()

    def _stands_still(self, path: Path) -> bool:
        changed, now = path.stat().st_mtime_ns, time.monotonic()
        before, since = self._seen.get(path.name, (None, now))
        if before != changed:
            self._seen[path.name] = (changed, now)
            return False
        return now - since > self.stale_s

    def _beat(self) -> None:
        while not self._ended.wait(self.stale_s / 8):
            for name in tuple(self._held):
                with contextlib.suppress(OSError):  # taken over while this machine slept
                    os.utime(self.folder / name)


def remove_free_claims(folder: Path) -> None:
    """Remove the claims of dead processes of this machine, and the folder if that leaves none."""
    with contextlib.suppress(OSError):
        claims, names = Claims(folder, math.inf), os.listdir(folder)
        claims.release([name for name in names if claims.take(name)])
        folder.rmdir()


class Lease:
    """This process's sign in the folder of a store that it is in use, which eviction respects; a read-only folder does without.

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
    _leases[path] = _lock(path, _LEASE_TIMEOUT_S)
    with contextlib.suppress(OSError):  # without locks the time of the file has to do
        _leases[path].acquire()


def _end(path: Path, pid: int) -> None:
    if os.getpid() == pid:
        with contextlib.suppress(OSError):
            path.unlink()


def is_alive(lease: Path) -> bool:
    """Whether the process of a lease lives: it locks it, or if it is another machine's has renewed it in half an hour. Else it goes."""
    with contextlib.suppress(OSError):
        is_late = time.time() - lease.stat().st_mtime > _EXPIRE_S
        if is_here(lease.name):
            try:
                with _lock(lease):
                    lease.unlink()
                return False
            except Timeout:
                return True
            except OSError as error:
                if error.errno not in _NO_LOCKS:
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
