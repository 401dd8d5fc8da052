"""Vision towers of transformers: cut behind the chosen layer, filled from a checkpoint that may hold much more, given adapters."""

from __future__ import annotations

import copy
import json
import pickle
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
from torch import Tensor, nn

from vlmcap.config import LoraConfig
from vlmcap.errors import UserError, first_line
from vlmcap.models.checkpoint import holding, read_safetensors, weight_files
from vlmcap.models.encoders.base import EncoderOptions, Family
from vlmcap.models.llm.adapt import peft_settings

# Where whole models keep their tower: CLIPModel and SiglipModel, InternVL and LLaVA, either of them inside the other, old and new.
_PREFIX = re.compile(r"^(?:model\.)?(?:vision_(?:tower|model)\.)+")
Names = Callable[[str], tuple[str, ...]]
"""From a tensor's name in the checkpoint to its names in the tower; several where one tensor holds several, stacked."""


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


def read_weights(folder: Path, shapes: Mapping[str, torch.Size], names: Names, dtype: torch.dtype) -> dict[str, Tensor]:
    """Every tensor in `shapes` and no other; files that hold none of them are not opened.

    Args:
        folder: Checkpoint in Hugging Face layout, of the tower alone or of a whole model.
        shapes: Of the tower's tensors, by name.
        names: What the checkpoint's names mean.
        dtype: Of what is returned.

    Raises:
        UserError: Weights are missing, unreadable or of another shape; transformers would fill the gaps with random numbers.
    """
    from safetensors import SafetensorError

    weights: dict[str, Tensor] = {}
    try:
        for key, tensor in _read(folder, lambda key: any(name in shapes for name in names(key))):
            targets = names(key)
            parts = tensor.chunk(len(targets))
            weights |= {
                # A part of a larger tensor would keep all of it in memory.
                name: part.to(dtype).clone() if len(targets) > 1 else part.to(dtype)
                for name, part in zip(targets, parts, strict=True)
                if name in shapes
            }
    except UserError:
        raise
    except (OSError, EOFError, ValueError, RuntimeError, SafetensorError, pickle.UnpicklingError) as error:
        raise UserError(
            f"encoder.checkpoint {folder} could not be read ({first_line(error)}); check encoder.family, or copy it again"
        ) from error
    _check(folder, shapes, weights)
    return weights


def _check(folder: Path, shapes: Mapping[str, torch.Size], weights: Mapping[str, Tensor]) -> None:
    missing = sorted(shapes.keys() - weights.keys())
    if missing:
        raise UserError(
            f"encoder.checkpoint {folder} lacks {len(missing)} weights of the vision tower, first: {missing[0]}; "
            "check encoder.family, or take a whole checkpoint"
        )
    for name, shape in shapes.items():
        if weights[name].shape != shape:
            raise UserError(
                f"encoder.checkpoint {folder} has {name} of shape {tuple(weights[name].shape)} where its config.json means "
                f"{tuple(shape)}; take config.json and weights of one checkpoint"
            )


def _read(folder: Path, is_wanted: Callable[[str], bool]) -> Iterator[tuple[str, Tensor]]:
    """Wanted tensors with their names in the checkpoint."""
    if weight_files(folder, "model.safetensors"):
        yield from read_safetensors(folder, is_wanted)
        return
    files = weight_files(folder, "pytorch_model.bin")  # what some older revisions on the hub have alone
    if not files:
        raise FileNotFoundError("it has no model.safetensors")
    for file in holding(files, is_wanted):
        # Files from before torch 1.6 are no zip archives, and only those can be mapped.
        pickled: Any = torch.load(file, map_location="cpu", weights_only=True, mmap=is_zipfile(file))
        yield from ((key, tensor) for key, tensor in pickled.items() if is_wanted(key))


def add_tower_lora(tower: nn.Module, lora: LoraConfig) -> None:
    """Puts adapters in float32 on every linear layer of a frozen tower, in place, so that it keeps its class and interface.

    Args:
        tower: Of a `VisionEncoder`.
        lora: Settings of the adapters; which modules they are on, and experts, are the language model's matter.

    Raises:
        UserError: The tower has no linear layer.
    """
    from peft import inject_adapter_in_model

    # Full names: in Qwen's towers a convolution has the last name of a linear layer (proj), and peft would adapt it too.
    targets = [name for name, module in tower.named_modules() if isinstance(module, nn.Linear)]
    if not targets:
        raise UserError("tuning.encoder=lora finds no linear layer in this encoder; set tuning.encoder=full or none")
    inject_adapter_in_model(peft_settings(lora, targets), tower)
    for name, parameter in tower.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if "lora_" in name:
            parameter.data = parameter.data.float()  # mixed precision wants float32 masters
