"""Traces of parts on disk, so that a table of fifty combinations traces each part once and a second plan none."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmcap.files import replacing

if TYPE_CHECKING:
    from vlmcap.planning.estimate.stages import StageTrace

_SOURCES = ("models", "planning", "assembly")  # packages that a trace runs


class TraceStore:
    """Traces by the content of what they were made of.

    Args:
        folder: JSON files, one a trace; made when the first is kept.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(self, key: dict[str, Any], make: Callable[[], StageTrace]) -> StageTrace:
        """The trace of `key`, made where it is not there; a file that cannot be read or written is no reason to fail.

        Args:
            key: Plain data that decides on the trace.
            make: Makes it.
        """
        from vlmcap.planning.estimate.stages import StageTrace

        text = json.dumps([key, _code_version()], sort_keys=True, default=str)
        file = self.folder / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.json"
        try:
            return StageTrace(**json.loads(file.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            pass
        trace = make()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with replacing(file) as partial:
                partial.write_text(json.dumps(trace.plain()), encoding="utf-8")
        except OSError:
            pass
        return trace


@cache
def _code_version() -> str:
    """Changes with our code and with the libraries that a trace runs."""
    from importlib.metadata import version

    digest = hashlib.sha256()
    for package in _SOURCES:
        for file in sorted((Path(__file__).parents[2] / package).rglob("*.py")):
            digest.update(file.read_bytes())
    libraries = " ".join(version(name) for name in ("torch", "transformers", "peft", "bitsandbytes"))
    return f"{digest.hexdigest()} {libraries}"
