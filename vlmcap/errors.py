"""The exception for a user's mistake, and what other exceptions say."""


class UserError(ValueError):
    """A mistake in configuration or input, told in one sentence: what is wrong, where, and how to mend it.

    The command-line programs print the sentence and exit with code 2; any other exception is a bug of ours and keeps its traceback.
    """


class DoesNotFit(UserError):  # noqa: N818 - says what is so
    """A run that its card cannot hold.

    Args:
        sentence: For the user.
        peak_gib: That the run needs.
        usable_gib: That the card has.
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


class Pruned(Exception):  # noqa: N818 - no error: the search has seen enough
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


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, of a card or of the computer, here or in what the error came from."""
    text = str(error)
    found = type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError)
    said = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")  # bitsandbytes' kernels say the first
    found = found or (isinstance(error, RuntimeError) and any(words in text for words in said))
    return found or (error.__cause__ is not None and is_out_of_memory(error.__cause__))
