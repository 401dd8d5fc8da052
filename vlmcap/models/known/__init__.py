"""Architectures of the published checkpoints that `conf/` names, so that sizes are known before anything is downloaded.

A file is a checkpoint's `config.json` in Hugging Face's layout, with the fields that decide shapes; rotary bases,
scales and token ids only where they could be read, as a download brings its own file. Its name is the hub id with `--`
for the slash.
"""

from __future__ import annotations

import json
from importlib.resources import files
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def known_config(checkpoint: str) -> dict[str, Any] | None:
    """The `config.json` of a published checkpoint, or None for one that is not known here (a local folder, say).

    Args:
        checkpoint: Hub id, such as `Qwen/Qwen3-8B`.
    """
    file = files(__name__) / f"{checkpoint.replace('/', '--')}.json"
    if "/" not in checkpoint or not file.is_file():
        return None
    config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return config


def known_checkpoints() -> list[str]:
    """The hub ids of all known checkpoints, sorted."""
    names = (file.name for file in files(__name__).iterdir())
    return sorted(name.removesuffix(".json").replace("--", "/") for name in names if name.endswith(".json"))


def known_model_config(checkpoint: str) -> PretrainedConfig:
    """The transformers configuration of a known checkpoint.

    Raises:
        KeyError: It is not known.
    """
    from transformers import AutoConfig

    config = known_config(checkpoint)
    if config is None:
        raise KeyError(checkpoint)
    return AutoConfig.for_model(**config)
