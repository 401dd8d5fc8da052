"""The exception for a user's mistake, and what other exceptions say."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path


class UserError(ValueError):
    """A mistake in configuration or input, told in one sentence: what is wrong, where, and how to mend it.

    The command-line programs print the sentence and exit with code 2; any other exception is a bug of ours and keeps
    its traceback.
    """


class DoesNotFitError(UserError):
    """A run that its GPU cannot hold.

    Args:
        sentence: For the user.
        peak_gib: That the run needs.
        usable_gib: That the GPU has.
    """

    def __init__(self, sentence: str, peak_gib: float = 0.0, usable_gib: float = 0.0) -> None:
        super().__init__(sentence)
        self.peak_gib, self.usable_gib = peak_gib, usable_gib


class InUseError(UserError):
    """A folder that another process writes to.

    Args:
        sentence: For the user.
        owner: Description of that process.
    """

    def __init__(self, sentence: str, owner: str) -> None:
        super().__init__(sentence)
        self.owner = owner


class NotPlannedError(UserError):
    """A run whose memory cannot be foretold; it may fit all the same."""


class TrialPruned(Exception):  # noqa: N818 - no error: the search has seen enough
    """A run that its search stopped, as others were better at the same point.

    Args:
        sentence: For the user.
        value: The last objective.
    """

    def __init__(self, sentence: str, value: float = float("nan")) -> None:
        super().__init__(sentence)
        self.value = value


def first_line(error: BaseException) -> str:
    """What a library's error says first, or its kind where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


class DivergedError(UserError):
    """A run whose loss or gradients went wrong; its last good checkpoint is left as it was."""


class OutOfMemoryError(UserError):
    """A run whose memory did not do, with what would make it smaller."""


class StoppedBySignal(BaseException):
    """A run that a signal stopped, its state saved.

    Args:
        sentence: For the user.
        number: Of the signal.
    """

    def __init__(self, sentence: str, number: int) -> None:
        super().__init__(sentence)
        self.number = number

    @property
    def exit_code(self) -> int:
        """As a shell has it for a process that died of the signal: 143 for SIGTERM, 130 for Ctrl-C, 138 for SIGUSR1."""
        return 128 + self.number


_OTHER_DISK = "make room there, or choose a folder on another disk"
_OTHER_FOLDER = "choose another folder, or change its permissions"
_STORAGE = {
    errno.ENOSPC: ("the disk is full", _OTHER_DISK),
    errno.EDQUOT: ("the disk quota is used up", _OTHER_DISK),
    errno.EROFS: ("the file system is read-only", "choose a folder that can be written to"),
    errno.EACCES: ("permission is denied", _OTHER_FOLDER),
    errno.EPERM: ("permission is denied", _OTHER_FOLDER),
    errno.ENOTDIR: ("a part of the path is a file", "choose another folder"),
    errno.EEXIST: ("a file of that name is there", "choose another folder"),
}
_SAID = re.compile(
    r"No space left on device|disk is full|Disk quota exceeded|Read-only file system"
)  # by libraries with errors of their own
_NUMBERS = {"Disk quota exceeded": errno.EDQUOT, "Read-only file system": errno.EROFS}


def storage_problem(error: BaseException, folder: str | Path | None = None) -> str | None:
    """A sentence for a folder that cannot be written to; None where no error in the chain is of that kind.

    Args:
        error: What was raised.
        folder: Where the program writes, for errors that name no file.
    """
    number = error.errno if isinstance(error, OSError) else None
    if number not in _STORAGE and (said := _SAID.search(str(error))):
        number = _NUMBERS.get(said.group(), errno.ENOSPC)
    if number not in _STORAGE:
        cause = error.__cause__ or error.__context__
        return None if cause is None else storage_problem(cause, folder)
    name = getattr(error, "filename", None)
    path = Path(os.fsdecode(name)) if isinstance(name, str | bytes) else None
    what, fix = _STORAGE[number]
    where = (
        (path.parent if path is not None and number in (errno.ENOSPC, errno.EDQUOT) else path)
        or folder
        or "a folder of this run"
    )
    keys = "paths.output_dir is that of a run, paths.cache_dir that of features and the demo"
    return f"{where} cannot be used, as {what}: {fix} ({keys})"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, of a GPU or of the computer, here or in what the error came from."""
    text = str(error)
    found = type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError)
    said = (
        "out of memory",
        "can't allocate memory",
        "CUBLAS_STATUS_ALLOC_FAILED",
    )  # bitsandbytes' kernels say the first
    found = found or (isinstance(error, RuntimeError) and any(words in text for words in said))
    return found or (error.__cause__ is not None and is_out_of_memory(error.__cause__))
