"""Memory profiles that are kept on disk between plans."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from vlmcap.files import write_json
from vlmcap.planning.estimate.stages import StageMemory

_PROFILED_PACKAGES = ("models", "planning", "assembly")  # packages whose code decides on a profile


class ProfileStore:
    """Caches memory profiles on disk, by the data that they depend on.

    Args:
        folder: Folder of JSON files, one per profile; created when the first is stored.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(self, key: dict[str, Any], make: Callable[[], StageMemory]) -> StageMemory:
        """Returns the profile of `key`, which is made if missing; files that cannot be read or written are ignored.

        Args:
            key: Plain data that decides on the profile.
            make: Makes the profile.
        """
        # Any change of the code or of a library makes a profile again.
        text = json.dumps([key, _code_version()], sort_keys=True, default=str)
        file = self.folder / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.json"
        try:
            return StageMemory(**json.loads(file.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            pass
        profile = make()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(file, profile.plain())
        except OSError:
            pass
        return profile


@cache
def _code_version() -> str:
    """Returns a hash of this package's code and of the library versions that decide on a profile."""
    digest = hashlib.sha256()
    for package in _PROFILED_PACKAGES:
        for file in sorted((Path(__file__).parents[2] / package).rglob("*.py")):
            digest.update(file.read_bytes())
    libraries = " ".join(version(name) for name in ("torch", "transformers", "peft", "bitsandbytes"))
    return f"{digest.hexdigest()} {libraries}"
