"""Folders that are made once, and are there whole or not at all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from vlmcap.files import new_folder
from vlmcap.locks import CLAIMS, claimed

_WAIT_S = 3600.0  # a slow machine takes minutes to train a tiny part, and lines say for whom it waits


def get_or_create(folder: Path, make: Callable[[Path], None]) -> Path:
    """`folder`, filled by `make` unless it is there.

    Of several processes one makes it and the others wait, and say for whom.

    A broken or killed making leaves nothing half-written under its name, and what it left beside it goes with the next.

    Args:
        folder: Its parents are made.
        make: Called with an empty folder to fill.

    Raises:
        InUseError: Another process makes it and has not finished in an hour.
    """
    if folder.is_dir():
        return folder
    advice = "start again when it has ended, or stop it"
    with claimed(folder.parent / CLAIMS / folder.name, f"{folder} is being made", advice, wait_s=_WAIT_S):
        if folder.is_dir():  # another process was faster
            return folder
        try:
            with new_folder(folder) as partial:
                make(partial)
        except OSError:
            if not folder.is_dir():  # made twice, where the claim did not hold
                raise
    return folder
