"""Claims on folders and work: files that processes on one or more machines lock and update.

Locks are those of the kernel (flock), which end with their process and cannot be left behind like a process number. For
mounts that do not share locks between machines, and for file servers that keep the locks of a dead machine, the
modification times of the files show which processes are alive.
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
"""Name of the folder of claims, inside the claimed folder."""
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
"""Error numbers of a file system without locks."""

_RUN = "run"  # name of the claim to a full folder
_STALE_S = 120.0  # without an update, after which a claim of another machine is free
_POLL_S = 0.2
_MAX_COMMAND = 120  # characters of an owner's command that are shown

_owned: dict[Path, int] = {}  # folders that `claimed_folder` holds -> process id, because forks inherit the table


def process_name() -> str:
    """Returns `machine-token` of this process; a process id would not be unique over containers and time."""
    return f"{machine_name()}-{_token(os.getpid())}"


def is_here(name: str) -> bool:
    """Returns whether a `process_name` belongs to this machine."""
    return name.partition("-")[0] == machine_name()


def describe_process() -> str:
    """Returns process id, machine, time and command of this process, for messages of other processes."""
    command = " ".join(shlex.join(sys.argv).split())
    shown = command if len(command) <= _MAX_COMMAND else f"{command[:_MAX_COMMAND]}…"
    return f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')} ({shown})"


@lru_cache
def _token(pid: int) -> str:
    """Returns eight hexadecimal digits, which differ in a fork."""
    return secrets.token_hex(4)


def file_lock(path: Path, timeout_s: float = 0.0) -> BaseFileLock:
    """Returns a lock of this process (not of a thread or a fork) on a file that other users may lock too.

    The library's fallback for file systems without locks is disabled, because it leaves files that nobody removes.
    """
    return FileLock(path, timeout_s, 0o666, thread_local=False, fallback_to_soft=False)


class Claims:
    """Claims of this process, in a context that releases them at its end.

    Claims avoid duplicate work, but stored features stay correct without them. A claim of a dead process on this
    machine is free immediately. A claim of another machine is free if its file has not been updated for `stale_s`,
    measured by the clock of this machine, because clocks may differ.

    Args:
        folder: Folder of the claims, which is created.
        stale_s: Seconds without an update after which a claim is free.
    """

    def __init__(self, folder: Path, stale_s: float) -> None:
        self.folder, self.stale_s = folder, stale_s
        self.is_locked_elsewhere = False  # whether the last claim that could not be taken is locked
        self._held: dict[str, BaseFileLock] = {}
        # name -> (time of the last update in ns, monotonic seconds at which this process first saw it)
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
            self.folder.rmdir()  # fails while others have claims

    def take(self, name: str) -> bool:
        """Takes a claim, and returns whether that succeeded."""
        path, lock = self.folder / name, file_lock(self.folder / name)
        with contextlib.suppress(OSError):
            # 1. Remove a claim that nobody has updated for too long.
            if self._is_stale(path):
                path.unlink()
        # 2. Lock the file. A lock ends with its process, however that dies.
        try:
            self.folder.mkdir(parents=True, exist_ok=True)  # the last process to leave removes it
            lock.acquire()
        except (Timeout, FileNotFoundError) as error:
            self.is_locked_elsewhere = isinstance(error, Timeout)
            return False
        except OSError as error:
            # On a file system without locks, the text and the age of the file decide alone.
            if error.errno not in NO_LOCKS:
                raise
        # 3. Locks may not reach across machines, so a file that another machine has written is not taken over.
        owner = path.read_text(errors="replace") if path.exists() else ""
        if owner and not (is_here(owner) and lock.is_locked):  # the owner may be alive on another machine
            lock.release()
            self.is_locked_elsewhere = False
            return False
        path.write_text(f"{process_name()}\n{describe_process()}")
        self._held[name] = lock
        return True

    def owner(self, name: str) -> tuple[str, int]:
        """Returns the text of a claim (name and description of its owner) and its time in ns; ("", 0) if it is gone."""
        path = self.folder / name
        with contextlib.suppress(OSError):
            return path.read_text(errors="replace"), path.stat().st_mtime_ns
        return "", 0

    def release(self, names: Iterable[str]) -> None:
        """Releases claims."""
        for name in names:
            lock = self._held.pop(name)
            with contextlib.suppress(OSError):
                # Before the lock ends, so that a process with the file open sees that it was removed.
                (self.folder / name).unlink()
            lock.release()

    def _is_stale(self, path: Path) -> bool:
        # The clock of another machine may differ, so only changes of its time are counted, by this machine's clock.
        changed, now = path.stat().st_mtime_ns, time.monotonic()
        before, since = self._seen.get(path.name, (None, now))
        if before != changed:
            self._seen[path.name] = (changed, now)
            return False
        return now - since > self.stale_s

    def _beat(self) -> None:
        # Eight updates in the time after which a claim is stale.
        while not self._ended.wait(self.stale_s / 8):
            for name in tuple(self._held):
                with contextlib.suppress(OSError):  # taken over while this machine slept
                    os.utime(self.folder / name)


def remove_free_claims(folder: Path) -> None:
    """Removes the claims of dead processes of this machine, and the folder if no claim is left."""
    with contextlib.suppress(OSError):
        claims, names = Claims(folder, math.inf), os.listdir(folder)
        claims.release([name for name in names if claims.take(name)])
        folder.rmdir()


@contextmanager
def claimed_folder(folder: Path, key: str) -> Iterator[None]:
    """Claims a folder inside the context, to which one process at a time may write.

    The folder is created with its parents, and removed at the end if it is empty. A process can claim a folder again
    that it holds already.

    Args:
        folder: Folder to write to.
        key: Setting that names the folder, for messages.

    Raises:
        InUseError: Another running process holds the folder.
        UserError: The folder cannot be written.
    """
    path = folder.absolute()
    # The same process may claim a folder again, such as a run inside of a job; a fork may not.
    if _owned.get(path) == os.getpid():
        yield
        return
    # Parents that the claim creates are removed again, if the block has left them empty.
    missing = [parent for parent in path.parents if not parent.exists()]
    try:
        with claimed(
            folder / CLAIMS / _RUN, f"{key}={folder} is in use", "wait until it ends, stop it, or choose another folder"
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
    """Returns the description of the process that holds a folder by `claimed_folder`; None if no other does."""
    if not (folder / CLAIMS / _RUN).exists():
        return None
    try:
        # A claim that can be taken has no living owner.
        with claimed_folder(folder, "folder"):
            return None
    except InUseError as error:
        return error.owner


@contextmanager
def claimed(claim: Path, state: str, advice: str, *, wait_s: float = 0.0) -> Iterator[None]:
    """Holds a claim inside the context.

    Claims of dead processes are taken over. A process on another machine, whose locks may not be visible here, has two
    minutes to update its claim.

    Args:
        claim: File of the claim, in a folder of claims.
        state: Message while another process has the claim, such as "the folder x is in use"; the owner is appended.
        advice: What the user can do then.
        wait_s: Seconds to wait for a running owner, which is named in a line.

    Raises:
        InUseError: A running process still holds the claim after `wait_s`.
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
            raise InUseError(f"{state} by {owner}{waited}; {advice}", owner)
        yield


def _wait(claims: Claims, name: str, state: str, wait_s: float) -> str:
    """Waits for a claim; returns "" if it was taken, or its owner if that is still running after `wait_s`."""
    # `first` is the time of the claim at the first look; a later one shows that its owner is alive.
    started, first, schedule = time.monotonic(), 0, None
    while not claims.take(name):
        text, changed = claims.owner(name)
        owner = text.partition("\n")[2]
        first = first or changed
        # On this machine, a locked file is proof enough.
        is_alive = changed != first or (claims.is_locked_elsewhere and is_here(text))
        if owner and is_alive and time.monotonic() - started >= wait_s:
            return owner
        if owner and (schedule is None or schedule.is_due()):
            schedule = schedule or LineClock()
            print(
                f"{state} by {owner}; waiting {'for it' if wait_s else 'to see whether it is still running'}",
                file=sys.stderr,
                flush=True,
            )
        time.sleep(_POLL_S)
    return ""
