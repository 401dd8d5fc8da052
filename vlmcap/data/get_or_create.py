"""Folders that are created one time and never seen half-filled."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from vlmcap.files import new_folder
from vlmcap.locks import CLAIMS, claimed

_WAIT_S = 3600.0  # a slow machine takes minutes to train a tiny component


def get_or_create(folder: Path, make: Callable[[Path], None]) -> Path:
    """Returns `folder`, and lets `make` fill it first if it does not exist.

    Of several processes one creates the folder; the others wait and log which process they wait for. If the process
    fails or is killed, nothing half-written remains under the folder's name, and its leftovers are removed by the next
    attempt.

    Args:
        folder: Folder to return; its parents are created.
        make: Callback that fills the empty folder it is given.

    Raises:
        InUseError: Another process is creating the folder and has not finished within an hour.
    """
    if folder.is_dir():
        return folder
    hint = "start again when it has ended, or stop it"
    with claimed(folder.parent / CLAIMS / folder.name, f"{folder} is being made", hint, wait_s=_WAIT_S):
        if folder.is_dir():  # another process was faster
            return folder
        try:
            with new_folder(folder) as partial:
                make(partial)
        except OSError:
            if not folder.is_dir():  # else another process created it where claims are not supported
                raise
    return folder
