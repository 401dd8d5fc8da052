"""Arrays in files that are read back completely or not at all."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlmcap.files import replacing

_DAMAGED = (OSError, ValueError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)


def save_arrays(path: Path, **arrays: NDArray[Any]) -> None:
    """Writes arrays to an `.npz` file, creating its parent folder.

    Raises:
        OSError: The file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial, partial.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


def load_arrays(path: Path) -> dict[str, NDArray[Any]] | None:
    """Loads the arrays of an `.npz` file; None if it is absent or damaged.

    An `.npz` file is a zip file, whose members have checksums.
    """
    try:
        with np.load(path, allow_pickle=False) as saved:
            return {name: np.asarray(saved[name]) for name in saved.files}
    except _DAMAGED:
        return None
