"""Folders that are made once, and are there whole or not at all."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Callable
from pathlib import Path

from vlmcap.locks import CLAIMS, claimed

_WAIT_S = 600.0


def make_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """`folder`, filled by `make` unless it is there; of several processes one makes it and the others wait, and say for whom.

    A broken or killed making leaves nothing half-written under its name, and what it left beside it goes with the next.

    Args:
        folder: Its parents are made.
        make: Called with an empty folder to fill.

    Raises:
        InUseError: Another process makes it and has not finished in ten minutes.
    """
    if folder.is_dir():
        return folder
    advice = "start again when it has ended, or stop it"
    with claimed(folder.parent / CLAIMS / folder.name, f"{folder} is being made", advice, wait_s=_WAIT_S):
        if folder.is_dir():  # another process was faster
            return folder
        for leftover in folder.parent.glob(f".{folder.name}.????????"):
            shutil.rmtree(leftover, ignore_errors=True)
        partial = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}")
        try:
            partial.mkdir()
            make(partial)
            if not folder.is_dir():
                partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return folder
