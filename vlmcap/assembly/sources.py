"""The frozen bases of a configuration's model: where they are, and what they hold."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vlmcap.config import Config

if TYPE_CHECKING:
    from vlmcap.models.checkpoint import Fingerprint


@dataclass(frozen=True, slots=True)
class Sources:
    """Where the frozen bases are, and what they hold: `encoder` and `llm`, or `model` where one brings both."""

    folders: dict[str, Path]
    bases: dict[str, Fingerprint]


def locate_sources(config: Config, *, is_encoder_only: bool = False) -> Sources:
    """Finds the bases and takes their fingerprints.

    Args:
        config: Of the run.
        is_encoder_only: The language model is not looked for where it is a base of its own.

    Raises:
        UserError: A checkpoint is not there.
    """
    from vlmcap.models.checkpoint import fingerprint, locate

    memo = Path(config.paths.cache_dir) / "fingerprints.json"
    folders: dict[str, Path] = {}
    bases: dict[str, Fingerprint] = {}
    parts = ("encoder",) if is_encoder_only else ("encoder", "llm")
    for part in ("model",) if config.is_whole else parts:
        settings, wanted = getattr(config, part), "vision_" if part == "encoder" else None
        folders[part] = locate(settings.checkpoint, settings.revision, key=f"{part}.checkpoint", gate=settings.gate, part=wanted)
        bases[part] = fingerprint(folders[part], settings.checkpoint, memo, wanted)
    return Sources(folders, bases)


def vision_part(config: Config) -> str:
    """The base that the vision encoder comes from."""
    return "model" if config.is_whole else "encoder"
