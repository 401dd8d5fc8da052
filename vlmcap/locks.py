"""Who works on what: files that processes on one or more machines lock and keep fresh.

A lock is the kernel's (flock): it ends with its process, however that ends, and cannot be left behind as a process
number can. What a lock does not reach beyond its machine for, the times of the files say: mounts that keep locks to
themselves, and file servers that count the locks of a machine that died.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import secrets
import shlex
import socket
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from types import TracebackType

from filelock import BaseFileLock, FileLock, Timeout

from vlmcap.errors import InUseError, UserError, first_line
from vlmcap.files import machine_name
from vlmcap.terminal import LineClock

CLAIMS = ".claims"
"""Name of the folder of claims inside of the folder that they are about."""
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
"""Errors of a file system without locks."""

_RUN = "run"  # name of the claim to a whole folder
_STALE_S = 120.0
_POLL_S = 0.2
_MAX_COMMAND = 120  # characters of an owner's command that are shown

_owned: dict[Path, int] = {}  # folders that `claimed_folder` holds -> number of the process, as forks inherit the table


def process_name() -> str:
    """`machine-token` of this process.

    Two names without hyphens, as a process number may be another's in a container or tomorrow.
    """
    return f"{machine_name()}-{_token(os.getpid())}"


def is_here(name: str) -> bool:
    """Whether a `process_name` is of this machine."""
    return name.partition("-")[0] == machine_name()


def describe_process() -> str:
    """Number, machine, time and command of this process, for those who meet its claim."""
    command = " ".join(shlex.join(sys.argv).split())
    shown = command if len(command) <= _MAX_COMMAND else f"{command[:_MAX_COMMAND]}…"
    return f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')} ({shown})"


@lru_cache
def _token(pid: int) -> str:
    """Eight hexadecimal digits, others in a fork."""
    return secrets.token_hex(4)


def file_lock(path: Path, timeout_s: float = 0.0) -> BaseFileLock:
    """A lock of this process, not of its thread or its forks, on a file that other users may lock too.

    The library's own way out on file systems without locks is not taken: it leaves files that nobody ever removes.
    """
    return FileLock(path, timeout_s, 0o666, thread_local=False, fallback_to_soft=False)


class Claims:
    """Claims of this process, in a context that gives them back at its end.

    The features of clips do not depend on a claim for their correctness: two processes with the same claim do the same
    work twice.

    A claim of a process that has ended on this machine is free at once. That of another machine is when the time of its
    file has stood still for `stale_s` by our own clock, as the clocks of two machines may differ.

    Args:
        folder: Folder of the claims; it is made here.
        stale_s: Seconds without a sign of life after which a claim is free.
    """

    def __init__(self, folder: Path, stale_s: float) -> None:
        self.folder, self.stale_s = folder, stale_s
        self.is_locked_elsewhere = False  # whether the last claim that was not ours to take is locked
        self._held: dict[str, BaseFileLock] = {}
        self._seen: dict[str, tuple[int, float]] = {}
        self._ended = threading.Event()
        self._pulse = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> Claims:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._pulse.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self.release(tuple(self._held))
        with contextlib.suppress(OSError):
            self.folder.rmdir()  # others' claims keep it

    def take(self, name: str) -> bool:
        """Whether the claim is ours now."""
        path, lock = self.folder / name, file_lock(self.folder / name)
        with contextlib.suppress(OSError):
            if self._stands_still(path):
                path.unlink()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)  # the last process to leave removes it
            lock.acquire()
        except (Timeout, FileNotFoundError) as error:
            self.is_locked_elsewhere = isinstance(error, Timeout)
            return False
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
        owner = path.read_text(errors="replace") if path.exists() else ""
        if owner and not (is_here(owner) and lock.is_locked):  # alive, as far as can be seen from here
            lock.release()
            self.is_locked_elsewhere = False
            return False
        path.write_text(f"{process_name()}\n{describe_process()}")
        self._held[name] = lock
        return True

    def owner(self, name: str) -> tuple[str, int]:
        """What stands in a claim, its owner's `process_name` and description, and the time of the file in ns.

        Nothing where it has gone.
        """
        path = self.folder / name
        with contextlib.suppress(OSError):
            return path.read_text(errors="replace"), path.stat().st_mtime_ns
        return "", 0

    def release(self, names: Iterable[str]) -> None:
        """Give claims back."""
        for name in names:
            lock = self._held.pop(name)
            with contextlib.suppress(OSError):
                (
                    self.folder / name
                ).unlink()  # before the lock ends: whoever has opened the file meanwhile sees that it has gone
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


@contextmanager
def claimed_folder(folder: Path, key: str) -> Iterator[None]:
    """Holds a folder that one program at a time may write to.

    It is made with its parents, and removed at the end if it is empty.

    A process may hold a folder again that it holds already.

    Args:
        folder: Folder to write to.
        key: Setting that names the folder, as the user knows it.

    Raises:
        InUseError: A living process holds the folder.
        UserError: The folder cannot be written to.
    """
    path = folder.absolute()
    if _owned.get(path) == os.getpid():
        yield
        return
    missing = [parent for parent in path.parents if not parent.exists()]
    try:
        with claimed(
            folder / CLAIMS / _RUN, f"{key}={folder} is in use", "wait for it to end, stop it, or choose another folder"
        ):
            _owned[path] = os.getpid()
            try:
                yield
            finally:
                del _owned[path]
    finally:
        for made in (path, *missing):
            with contextlib.suppress(OSError):
                made.rmdir()


def living_owner(folder: Path) -> str | None:
    """Description of the process that holds a folder by `claimed_folder`; None where nobody else does."""
    if not (folder / CLAIMS / _RUN).exists():
        return None
    try:
        with claimed_folder(folder, "folder"):
            return None
    except InUseError as error:
        return error.owner


@contextmanager
def claimed(claim: Path, state: str, advice: str, *, wait_s: float = 0.0) -> Iterator[None]:
    """Holds a claim, whose file is `claim`.

    A process that has ended blocks nobody. One on another machine, whose locks may not reach here, gets two minutes to
    show a sign of life.

    Args:
        claim: File of the claim, in a folder of claims.
        state: What holds while another process has the claim, such as "the folder x is in use"; the owner is named
            behind it.
        advice: How to go on then.
        wait_s: Seconds to wait for a living owner; a line says who it is.

    Raises:
        InUseError: A living process holds the claim, and still does after `wait_s`.
        UserError: The claim cannot be written.
    """
    with contextlib.ExitStack() as stack:
        try:
            owner = _wait(stack.enter_context(Claims(claim.parent, _STALE_S)), claim.name, state, wait_s)
        except OSError as error:
            raise UserError(
                f"{claim.parent.parent} cannot be written to ({first_line(error)}); choose another folder"
            ) from error
        if owner:
            waited = f", after {wait_s:.0f} s of waiting" if wait_s else ""
            raise InUseError(f"{state} by {owner}{waited}: {advice}", owner)
        yield


def _wait(claims: Claims, name: str, state: str, wait_s: float) -> str:
    """Empty once the claim is ours; its owner where that lives after `wait_s`."""
    started, first, schedule = time.monotonic(), 0, None
    while not claims.take(name):
        text, changed = claims.owner(name)
        owner = text.partition("\n")[2]
        first = first or changed
        is_alive = changed != first or (claims.is_locked_elsewhere and is_here(text))
        if owner and is_alive and time.monotonic() - started >= wait_s:
            return owner
        if owner and (schedule is None or schedule.is_due()):
            schedule = schedule or LineClock()
            print(
                f"{state} by {owner}; waiting for it{'' if wait_s else ' to show whether it still runs'}",
                file=sys.stderr,
                flush=True,
            )
        time.sleep(_POLL_S)
    return ""
