"""The vision encoder of a whole model alone: its weights to fill a feature cache with, or no more than its sizes."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path
from typing import Any

import torch

from vlmcap.errors import UserError, first_line
from vlmcap.models.encoders import load_encoder, sketch_encoder
from vlmcap.models.encoders.processor import read_processor
from vlmcap.models.encoders.tower import read_config
from vlmcap.models.llm.attention import choose_attention
from vlmcap.models.pretrained.llava import vision_options
from vlmcap.models.pretrained.qwen_vl import FAMILIES, vision_encoder

# A tower's names in the files of published checkpoints, and in those that transformers 5 writes.
_OUT_OF_WHOLE = {r"^(?:model\.)?visual\.": ""}


def load_vision(kind: str, folder: Path, *, dtype: torch.dtype, attention: str, device: str, max_patches: int) -> Any:
    """The vision encoder of a whole model, frozen, with the interface of `VisionEncoder`; the language model is not read.

    Args:
        kind: As `load_pretrained` takes it.
        folder: Checkpoint in Hugging Face layout.
        dtype: Of the weights.
        attention: As `choose_attention` takes it.
        device: Where it will run.
        max_patches: Patches a frame at most, for the Qwen family.

    Raises:
        UserError: The folder holds no such model, or only a part of its tower.
    """
    if kind == "llava_next_video":
        return load_encoder("clip", folder, vision_options(read_config(folder), dtype))
    from safetensors import SafetensorError

    tower_class, config = _tower_of(kind, folder)
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": choose_attention(attention, device, dtype, tower_class)}
    try:
        tower, loading = tower_class.from_pretrained(
            folder, config=config, key_mapping=_OUT_OF_WHOLE, weights_only=True, output_loading_info=True, **options
        )
    except (ValueError, KeyError, OSError, EOFError, RuntimeError, SafetensorError, pickle.UnpicklingError) as error:
        raise UserError(f"model.checkpoint {folder} could not be loaded as {kind}: {first_line(error)}") from error
    if missing := sorted(loading["missing_keys"]):  # transformers would fill them with random numbers
        raise UserError(f"model.checkpoint {folder} lacks {len(missing)} weights, first: {missing[0]}; take a whole checkpoint")
    return vision_encoder(kind, tower, max_patches=max_patches, processor=read_processor(folder))


def sketch_vision(kind: str, folder: Path, *, dtype: torch.dtype, max_patches: int) -> Any:
    """The same encoder without its weights, on the meta device: its sizes and its transform.

    Raises:
        UserError: The folder holds no such model.
    """
    if kind == "llava_next_video":
        return sketch_encoder("clip", folder, vision_options(read_config(folder), dtype))
    tower_class, config = _tower_of(kind, folder)
    with torch.device("meta"):
        tower = tower_class._from_config(config, dtype=dtype)
        return vision_encoder(kind, tower, max_patches=max_patches, processor=read_processor(folder))


def _tower_of(kind: str, folder: Path) -> tuple[Any, Any]:
    """Class and configuration of a Qwen model's tower."""
    import transformers

    found = read_config(folder).get("model_type")
    if found != kind:
        raise UserError(f"model.checkpoint {folder} is of type {found}, not {kind}; choose the model= that fits it")
    model_class = getattr(transformers, FAMILIES[kind].class_name)
    # Not all of the towers' classes are among the names that the package itself offers.
    tower_class = getattr(sys.modules[model_class.__module__], FAMILIES[kind].tower_name)
    return tower_class, model_class.config_class.from_pretrained(folder).vision_config
