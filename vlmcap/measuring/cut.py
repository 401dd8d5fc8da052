"""A configuration whose encoder and language model have few blocks, for measurements that are to be small."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from vlmcap.config import Config
from vlmcap.planning.estimate.meta_models import architecture


def with_blocks(config: Config, num_blocks: int, folder: Path) -> Config:
    """The configuration with its bases cut to so many blocks.

    Args:
        config: Of the run.
        num_blocks: That encoder and language model keep, where they have more.
        folder: Takes the `config.json`s of the cut bases, and traces of them.
    """
    paths = dataclasses.replace(config.paths, cache_dir=str(folder / "cache"))
    config = dataclasses.replace(config, paths=paths)
    if config.is_whole:
        values = architecture(config, "model")
        text = values.get("text_config") or values
        _cut(text, num_blocks)
        layer = values.get("vision_feature_layer", -1)  # of LLaVA
        _cut(values.get("vision_config") or {}, _total_blocks(num_blocks, layer if isinstance(layer, int) else -1))
        model = dataclasses.replace(config.model, checkpoint=_write(folder / "model", values))
        return dataclasses.replace(config, model=model)
    text = architecture(config, "llm")
    _cut(text.get("text_config") or text, num_blocks)
    vision = architecture(config, "encoder")
    layer = config.encoder.feature_layer
    _cut(vision.get("vision_config") or vision, _total_blocks(num_blocks, layer))
    encoder = dataclasses.replace(
        config.encoder, checkpoint=_write(folder / "encoder", vision), feature_layer=min(layer, num_blocks) if layer >= 0 else layer
    )
    llm = dataclasses.replace(config.llm, checkpoint=_write(folder / "llm", text))
    return dataclasses.replace(config, encoder=encoder, llm=llm)


def _total_blocks(num_blocks: int, layer: int) -> int:
    """Blocks of a tower of which so many run: a layer that is counted from the end leaves those behind it out."""
    return num_blocks if layer >= 0 else num_blocks - 1 - layer


def _cut(values: dict[str, Any], num_blocks: int) -> None:
    """Fewer blocks in the part of a `config.json`, in place; Qwen's towers call them depth, and name layers that give features."""
    for key in ("num_hidden_layers", "depth"):
        if key in values:
            values[key] = min(int(values[key]), num_blocks)
    if values.get("layer_types"):
        values["layer_types"] = values["layer_types"][:num_blocks]
    if values.get("deepstack_visual_indexes"):
        values["deepstack_visual_indexes"] = [*range(min(num_blocks, len(values["deepstack_visual_indexes"])))]


def _write(folder: Path, values: dict[str, Any]) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values), encoding="utf-8")
    return str(folder)
