"""The log of clips that could not be used."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from vlmcap.errors import UserError
from vlmcap.types import Skipped

with contextlib.suppress(ImportError):  # Windows, where lines of several processes may be written twice
    import fcntl

_MAX_LINES = 100_000
_MAX_REASON = 1000  # characters
_KEY_BYTES = 8
_LOCK_TIMEOUT_S = 10.0  # other processes hold the lock while they write a few lines


class SkippedClipLog:
    """A JSON-lines file that lists each unusable clip one time, with a limit on their number.

    All processes of a run may share the file; whenever a process adds a clip, it also counts those that the others
    added since it started. A resumed run continues the file without repeating lines, but earlier entries do not count
    against the limit, since those clips may have been repaired.

    Memory and file size are bounded: a few bytes per bad clip and at most `max_lines` lines; later clips are only
    counted.

    Args:
        path: Log file with one object {id, video, reason} per line; created with its folder at the first bad clip.
        max_bad_fraction: Largest share of unusable clips, 0 to 1.
        num_clips: Number of clips that the share refers to.
        max_lines: Largest number of lines in the file.
    """

    def __init__(
        self, path: str | Path, max_bad_fraction: float, num_clips: int, *, max_lines: int = _MAX_LINES
    ) -> None:
        self.path = Path(path)
        self.max_bad_fraction = max_bad_fraction
        self.num_clips = num_clips
        self.max_lines = max_lines
        self._bad: set[bytes] = set()
        self._first = ""
        self._written: set[bytes] = set()
        self._read_bytes = 0
        if self.path.is_file():
            with self.path.open("rb") as file:
                self._read_new(file.fileno())

    def __len__(self) -> int:
        return len(self._bad)

    def add(self, skipped: Skipped) -> None:
        """Adds a clip; adding the same clip again has no effect."""
        self.add_all([skipped])

    def add_all(self, entries: Iterable[Skipped]) -> None:
        """Adds several clips, such as those whose labels were found bad before training, each one time."""
        fresh: dict[bytes, Skipped] = {}
        for skipped in entries:
            key = _key(skipped.clip.id, skipped.clip.video)
            self._first = self._first or f"{skipped.clip.id} ({skipped.reason[:_MAX_REASON]})"
            self._bad.add(key)
            if key not in self._written and len(self._written) + len(fresh) < self.max_lines:
                fresh[key] = skipped
        if fresh:
            self._write(fresh)

    def check(self) -> None:
        """Checks that few enough clips are bad.

        Raises:
            UserError: More than `max_bad_fraction` of the clips are bad.
        """
        if len(self._bad) <= self.max_bad_fraction * self.num_clips:
            return
        raise UserError(
            f"{len(self._bad)} of {self.num_clips} clips cannot be used, more than "
            f"data.max_bad_fraction={self.max_bad_fraction} allows, the first being {self._first}; repair or remove "
            f"the clips listed in {self.path}, or raise data.max_bad_fraction"
        )

    def _write(self, fresh: dict[bytes, Skipped]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(self.path) as file:
            # Lines of other processes, which count towards the limit.
            self._bad |= self._read_new(file)
            lines = [_line(skipped) for key, skipped in fresh.items() if key not in self._written]
            # A single write, so that lines do not mix even without a lock.
            os.write(file, _line_break(file) + b"".join(lines))
            self._read_new(file)

    def _read_new(self, file: int) -> set[bytes]:
        """Returns the keys on complete lines not read so far, our own included; lines torn by a kill are ignored."""
        # From the end of the last read.
        os.lseek(file, self._read_bytes, os.SEEK_SET)
        data = b""
        while chunk := os.read(file, 1 << 20):
            data += chunk
        keys = {key for line in data.split(b"\n") if (key := _key_of(line)) is not None}
        self._read_bytes += len(data)
        self._written |= keys
        return keys


def _line_break(file: int) -> bytes:
    """Returns a line break if a kill tore the last line, so that the next one starts on its own line."""
    if os.lseek(file, 0, os.SEEK_END) == 0:
        return b""
    os.lseek(file, -1, os.SEEK_END)
    return b"" if os.read(file, 1) == b"\n" else b"\n"


def _line(skipped: Skipped) -> bytes:
    clip = skipped.clip
    entry = {"id": clip.id, "video": clip.video, "reason": skipped.reason[:_MAX_REASON]}
    # File names may hold bytes that are not UTF-8; Python's escapes of them are also JSON's.
    return json.dumps(entry, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"


def _key_of(line: bytes) -> bytes | None:
    try:
        entry = json.loads(line)
        return _key(str(entry["id"]), str(entry["video"]))
    except (ValueError, KeyError, TypeError):
        return None


def _key(name: str, video: str) -> bytes:
    """Returns a hash of id and video, as ids are unique within a split only."""
    return hashlib.blake2b(f"{name}\0{video}".encode("utf-8", "surrogatepass"), digest_size=_KEY_BYTES).digest()


def _wait_for_lock(file: int) -> None:
    """Acquires the lock, or gives up where the file system has none or a suspended process holds it for too long."""
    deadline_s = time.monotonic() + _LOCK_TIMEOUT_S
    while time.monotonic() < deadline_s:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.01)
        except OSError:
            return
        else:
            return


@contextmanager
def _locked(path: Path) -> Iterator[int]:
    file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        with contextlib.suppress(NameError):
            _wait_for_lock(file)
        yield file
    finally:
        os.close(file)
