"""Folders that are made once, and are there whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path


def make_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """`folder`, filled by `make` unless it is there.

    A broken or parallel making leaves nothing half-written under its name; what a killed process left beside it is removed.

    Args:
        folder: Its parents are made.
        make: Called with an empty folder to fill.
    """
    if folder.is_dir():
        return folder
    for leftover in folder.parent.glob(f".{folder.name}.*"):
        if not _is_running(leftover.suffix[1:]):
            shutil.rmtree(leftover, ignore_errors=True)
    partial = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        make(partial)
        if not folder.is_dir():  # another process may have been faster
            partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _is_running(process: str) -> bool:
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return False
    except (ValueError, PermissionError):
        return True
    return True
