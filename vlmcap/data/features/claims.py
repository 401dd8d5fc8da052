"""Who works on what: files that processes on one or more machines create in a shared folder, and keep fresh while they live.

Creating a file that must not exist is atomic on local and network file systems alike, where locks are not. Nothing depends on a claim for
its correctness: two processes with the same claim do the same work twice.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

from vlmcap.data.features.processes import is_dead, process_name

FOLDER = ".claims"
"""In the folder of a store."""


class Claims:
    """Claims of this process, in a context that gives them back at its end.

    A claim of a process that has ended on this machine is free at once. That of another machine is when the time of its file has stood
    still for `stale_s` by our own clock, as the clocks of two machines may differ.

    Args:
        folder: Of the claims; made here.
        stale_s: Seconds without a sign of life after which a claim is free.
    """

    def __init__(self, folder: Path, stale_s: float) -> None:
        self.folder, self.stale_s = folder, stale_s
        self._held: set[str] = set()
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
        path = self.folder / name
        if self._create(path):
            return True
        if not self._is_abandoned(path):
            return False
        aside = self.folder / f".{name}.{secrets.token_hex(4)}"
        with contextlib.suppress(OSError):  # somebody else was faster
            path.rename(aside)
            aside.unlink()
        return self._create(path)

    def release(self, names: Iterable[str]) -> None:
        """Give claims back."""
        for name in names:
            self._held.discard(name)
            with contextlib.suppress(OSError):
                (self.folder / name).unlink()

    def _create(self, path: Path) -> bool:
        try:
            self.folder.mkdir(exist_ok=True)  # the last process to leave removes it
            with path.open("x") as file:
                file.write(process_name())
        except (FileExistsError, FileNotFoundError):
            return False
        self._held.add(path.name)
        return True

    def _is_abandoned(self, path: Path) -> bool:
        try:
            owner, changed = path.read_text(), path.stat().st_mtime_ns
        except (OSError, ValueError):
            return False
        now = time.monotonic()
        before, since = self._seen.get(path.name, (None, now))
        if before != changed:
            self._seen[path.name] = (changed, now)
            since = now
        return is_dead(owner) or now - since > self.stale_s

    def _beat(self) -> None:
        while not self._ended.wait(self.stale_s / 8):
            for name in tuple(self._held):
                with contextlib.suppress(OSError):  # taken over while this machine slept
                    os.utime(self.folder / name)
