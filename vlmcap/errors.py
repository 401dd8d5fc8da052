"""The one exception for a user's mistake."""


class UserError(ValueError):
    """A mistake in configuration or input, told in one sentence: what is wrong, where, and how to mend it.

    The command-line programs print the sentence and exit with code 2; any other exception is a bug of ours and keeps its traceback.
    """


def first_line(error: Exception) -> str:
    """What a library's error says first, or its kind where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
