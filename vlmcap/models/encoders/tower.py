"""A vision tower of transformers, cut behind the chosen layer."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vlmcap.errors import UserError
from vlmcap.models.encoders.base import EncoderOptions, Family
from vlmcap.models.encoders.weights import read_weights

# Where whole models keep their tower: CLIPModel and SiglipModel, InternVL and LLaVA, either of them inside the other, old and new.
_PREFIX = re.compile(r"^(?:model\.)?(?:vision_(?:tower|model)\.)+")


def vision_config(family: Family, values: Mapping[str, Any], source: str) -> Any:
    """The configuration of the tower alone, in transformers' class.

    Args:
        family: Whose class it is.
        values: A `config.json`, of the tower or of a whole model.
        source: What it was read from, for the error.

    Raises:
        UserError: It is another family's.
    """
    from transformers import AutoConfig

    part = values.get("vision_config") or values
    model_type = part.get("model_type", family.model_type)
    if model_type not in (family.model_type, *family.other_model_types):
        raise UserError(f"{source} holds a vision tower of type '{model_type}', not '{family.model_type}'; check encoder.family")
    known = {key: value for key, value in family.config_values(part).items() if key != "model_type"}
    return AutoConfig.for_model(family.model_type, **known)


def read_config(folder: Path) -> dict[str, Any]:
    """The `config.json` of a checkpoint.

    Raises:
        UserError: There is none.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise UserError(f"encoder.checkpoint {folder} has no config.json; name a folder in Hugging Face layout")
    values: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return values


def build_tower(family: Family, config: Any, options: EncoderOptions) -> nn.Module:
    """The tower with random weights, without the blocks behind the chosen layer: its last hidden state is the features.

    Args:
        family: Of the tower.
        config: As `vision_config` returned it; its number of layers is set to those kept.
        options: Layer, type of weights and attention.

    Raises:
        UserError: There is no such layer.
    """
    from transformers import AutoModel

    layer, depth = options.feature_layer, int(config.num_hidden_layers)
    if not -depth - 1 <= layer <= depth:
        raise UserError(f"encoder.feature_layer must be in {-depth - 1}…{depth} for this encoder, not {layer}")
    config.num_hidden_layers = layer if layer >= 0 else depth + 1 + layer
    attention = "sdpa" if "flash" in options.attention and not family.has_flash else options.attention
    tower: nn.Module = AutoModel.from_config(config, dtype=options.dtype, attn_implementation=attention)
    if not (family.is_normed and layer == -1):
        setattr(tower, family.final_norm, nn.Identity())
    return tower


def load_tower(family: Family, config: Any, folder: Path, options: EncoderOptions) -> nn.Module:
    """The tower with its weights out of `folder`; nothing else is read, no memory is spent on anything else.

    Args:
        family: Of the tower.
        config: As `vision_config` returned it.
        folder: Checkpoint of the tower or of a whole model.
        options: Layer, type of weights and attention.

    Raises:
        UserError: No such layer, or weights are missing, unreadable or of another shape.
    """
    with torch.device("meta"):
        tower = build_tower(family, config, options)
    shapes = {name: tensor.shape for name, tensor in tower.state_dict().items()}
    weights = read_weights(folder, shapes, lambda key: family.names(_PREFIX.sub("", key)), options.dtype)
    tower.load_state_dict(weights, assign=True)
    _fill_buffers(tower, config, options)
    return tower


def _fill_buffers(tower: nn.Module, config: Any, options: EncoderOptions) -> None:
    """Computes the tables that are in no checkpoint (position ids, frequencies), by building a tower of no blocks in earnest."""
    from transformers import AutoModel

    if not any(buffer.is_meta for buffer in tower.buffers()):
        return
    shallow = copy.deepcopy(config)
    shallow.num_hidden_layers = 0
    with torch.random.fork_rng(devices=[]):
        buffers = AutoModel.from_config(shallow, dtype=options.dtype).named_buffers()
    for name, buffer in buffers:
        module, _, leaf = name.rpartition(".")
        setattr(tower.get_submodule(module), leaf, buffer)
    assert not any(buffer.is_meta for buffer in tower.buffers()), "a table inside a block"
