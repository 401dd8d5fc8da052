"""Configurations of the published checkpoints that `conf/` names, so that sizes are known before a download.

Each file is a checkpoint's `config.json` in Hugging Face layout with at least the fields that determine shapes. It may
lack rotary bases, scales and token ids, as a downloaded checkpoint has its own file. The file name is the hub id with
`--` for the slash.
"""

from __future__ import annotations

import json
from importlib.resources import files
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def known_config(checkpoint: str) -> dict[str, Any] | None:
    """Returns the `config.json` of a published checkpoint; None for an unknown one, such as a local folder.

    Args:
        checkpoint: Hub id, such as `Qwen/Qwen3-8B`.
    """
    file = files(__name__) / f"{checkpoint.replace('/', '--')}.json"
    if "/" not in checkpoint or not file.is_file():
        return None
    config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return config


def known_checkpoints() -> list[str]:
    """Returns the hub ids of all known checkpoints, sorted."""
    names = (file.name for file in files(__name__).iterdir())
    return sorted(name.removesuffix(".json").replace("--", "/") for name in names if name.endswith(".json"))


def known_model_config(checkpoint: str) -> PretrainedConfig:
    """Returns the transformers configuration of a known checkpoint.

    Raises:
        KeyError: The checkpoint is unknown.
    """
    from transformers import AutoConfig

    config = known_config(checkpoint)
    if config is None:
        raise KeyError(checkpoint)
    return AutoConfig.for_model(**config)
