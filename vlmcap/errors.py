"""Exceptions with messages for the user, and the interpretation of other exceptions."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path


class UserError(ValueError):
    """A mistake in configuration or input, with one sentence: what is wrong, which key or file, and how to fix it.

    The command-line programs print the sentence and exit with code 2; any other exception is a bug and keeps its
    traceback.
    """


class DoesNotFitError(UserError):
    """A run that does not fit on its GPU.

    Args:
        sentence: Message for the user.
        peak_gib: Memory in GiB that the run needs.
        usable_gib: Memory in GiB that the GPU has.
    """

    def __init__(self, sentence: str, peak_gib: float = 0.0, usable_gib: float = 0.0) -> None:
        super().__init__(sentence)
        self.peak_gib, self.usable_gib = peak_gib, usable_gib


class InUseError(UserError):
    """A folder to which another process writes.

    Args:
        sentence: Message for the user.
        owner: Description of that process.
    """

    def __init__(self, sentence: str, owner: str) -> None:
        super().__init__(sentence)
        self.owner = owner


class NotPlannedError(UserError):
    """A run whose memory cannot be planned; it may fit nevertheless."""


class TrialPruned(Exception):  # noqa: N818 - a signal of the search, named as in Optuna
    """A run that its search stopped, because other trials were better at the same point.

    Args:
        sentence: Message for the user.
        value: Last value of the objective.
    """

    def __init__(self, sentence: str, value: float = float("nan")) -> None:
        super().__init__(sentence)
        self.value = value


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message, or its type if the message is empty."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


class DivergedError(UserError):
    """A run whose loss or gradients diverged; its last good checkpoint is kept."""


class OutOfMemoryError(UserError):
    """A run that exceeded its memory, with settings that would make it smaller."""


class StoppedBySignal(BaseException):
    """A run that a signal stopped after its state was saved.

    Args:
        sentence: Message for the user.
        number: Number of the signal.
    """

    def __init__(self, sentence: str, number: int) -> None:
        super().__init__(sentence)
        self.number = number

    @property
    def exit_code(self) -> int:
        """Exit code that shells report for the signal: 143 for SIGTERM, 130 for Ctrl-C, 138 for SIGUSR1."""
        return 128 + self.number


_OTHER_DISK = "make room there, or choose a folder on another disk"
_OTHER_FOLDER = "choose another folder, or change its permissions"
_STORAGE = {
    errno.ENOSPC: ("the disk is full", _OTHER_DISK),
    errno.EDQUOT: ("the disk quota is used up", _OTHER_DISK),
    errno.EROFS: ("the file system is read-only", "choose a folder that can be written to"),
    errno.EACCES: ("permission is denied", _OTHER_FOLDER),
    errno.EPERM: ("permission is denied", _OTHER_FOLDER),
    errno.ENOTDIR: ("a component of the path is a file", "choose another folder"),
    errno.EEXIST: ("a file of that name exists", "choose another folder"),
}
# Messages of libraries that raise their own errors.
_MESSAGE = re.compile(r"No space left on device|disk is full|Disk quota exceeded|Read-only file system")
_NUMBERS = {"Disk quota exceeded": errno.EDQUOT, "Read-only file system": errno.EROFS}


def storage_problem(error: BaseException, folder: str | Path | None = None) -> str | None:
    """Returns a sentence for a folder that cannot be written, or None if no error in the chain is about storage.

    Args:
        error: The exception.
        folder: Folder that the program writes, for errors that name no file.
    """
    number = error.errno if isinstance(error, OSError) else None
    if number not in _STORAGE and (message := _MESSAGE.search(str(error))):
        number = _NUMBERS.get(message.group(), errno.ENOSPC)
    if number not in _STORAGE:
        # Libraries wrap errors of the system, or raise their own while they handle one.
        cause = error.__cause__ or error.__context__
        return None if cause is None else storage_problem(cause, folder)
    name = getattr(error, "filename", None)
    path = Path(os.fsdecode(name)) if isinstance(name, str | bytes) else None
    what, hint = _STORAGE[number]
    where = (
        # A full disk concerns the folder, not the one file.
        (path.parent if path is not None and number in (errno.ENOSPC, errno.EDQUOT) else path)
        or folder
        or "a folder of this run"
    )
    keys = "paths.output_dir is the folder of a run, paths.cache_dir that of features and the demo"
    return f"{where} cannot be used, because {what}; {hint} ({keys})"


def is_out_of_memory(error: BaseException) -> bool:
    """Returns whether GPU or host memory ran out, in the error or in its causes."""
    messages = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")  # the first by bitsandbytes
    return (
        type(error).__name__ == "OutOfMemoryError"
        or isinstance(error, MemoryError)
        or (isinstance(error, RuntimeError) and any(message in str(error) for message in messages))
        or (error.__cause__ is not None and is_out_of_memory(error.__cause__))
    )
