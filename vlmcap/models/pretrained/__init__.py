"""Pretrained VLMs with the interface of assembled models, and their vision encoders alone.

A vision encoder alone fills the feature cache, or states its sizes on the meta device.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from vlmcap.config import Qwen3VlConfig
from vlmcap.errors import UserError
from vlmcap.models.encoders import build_meta_encoder, load_encoder
from vlmcap.models.encoders.preprocessing import read_processor
from vlmcap.models.encoders.tower import read_config
from vlmcap.models.llm.attention import choose_attention
from vlmcap.models.pretrained.components import VlmComponents, read_model
from vlmcap.models.pretrained.llava import build_llava, load_llava, vision_options
from vlmcap.models.pretrained.qwen_vl import FAMILIES, build_qwen_vl, load_qwen_vl, vision_encoder

# Prefixes of the tower's tensors in published checkpoints, and in those that transformers 5 writes.
_TOWER_KEYS = {r"^(?:model\.)?visual\.": ""}


def load_pretrained(
    kind: str,
    folder: Path,
    *,
    dtype: torch.dtype,
    quantization: str,
    attention: str,
    device: str,
    max_patches: int,
    use_outer_marks: bool = Qwen3VlConfig.use_outer_marks,
    is_on_host: bool = False,
) -> VlmComponents:
    """Loads a pretrained VLM and splits it into components: frozen encoder and language model, float32 projector.

    Args:
        kind: "llava_next_video", "qwen2_vl", "qwen2_5_vl" or "qwen3_vl".
        folder: Checkpoint in Hugging Face layout; its own code is never run.
        dtype: Dtype of unquantised weights, and of the arithmetic on quantised ones.
        quantization: Quantisation of the language model: "none", "8bit" or "4bit".
        attention: Requested attention, as for `choose_attention`.
        device: Device that the model will run on, such as "cpu" or "cuda:0"; weights are loaded to it.
        is_on_host: Whether unquantised weights stay in host memory, for a model that will be sharded.
        max_patches: Maximum patches per frame, for the Qwen family; LLaVA's frames have one size.
        use_outer_marks: Whether an outer pair `<|vision_start|>…<|vision_end|>` surrounds Qwen3-VL's frames, as in its
            processor since transformers 5.10; other models always have one pair.

    Raises:
        UserError: The folder holds another model, or an incomplete one.
    """
    _check_kind(kind, folder)
    if kind == "llava_next_video":
        return load_llava(
            folder, dtype=dtype, quantization=quantization, attention=attention, device=device, is_on_host=is_on_host
        )
    language: dict[str, Any] = {"dtype": dtype, "quantization": quantization, "attention": attention, "device": device}
    language["is_on_host"] = is_on_host
    return load_qwen_vl(kind, folder, **language, max_patches=max_patches, use_outer_marks=use_outer_marks)


def build_pretrained(
    kind: str,
    config: Mapping[str, Any],
    *,
    dtype: torch.dtype,
    max_patches: int,
    use_outer_marks: bool = Qwen3VlConfig.use_outer_marks,
) -> VlmComponents:
    """Builds the components of a `config.json` with random weights; under `torch.device("meta")` without any."""
    if kind == "llava_next_video":
        return build_llava(config, dtype=dtype)
    return build_qwen_vl(kind, config, dtype=dtype, max_patches=max_patches, use_outer_marks=use_outer_marks)


def load_vision(kind: str, folder: Path, *, dtype: torch.dtype, attention: str, device: str, max_patches: int) -> Any:
    """Loads the vision encoder of a pretrained VLM, frozen, with the interface of `VisionEncoder`.

    The language model is not read.

    Args:
        kind: As for `load_pretrained`.
        folder: Checkpoint in Hugging Face layout.
        dtype: Dtype of the weights.
        attention: Requested attention, as for `choose_attention`.
        device: Device that the encoder will run on; weights are loaded to it.
        max_patches: Maximum patches per frame, for the Qwen family.

    Raises:
        UserError: The folder holds no such model, or an incomplete tower.
    """
    if kind == "llava_next_video":
        return load_encoder(folder, vision_options(read_config(folder), dtype), device)
    tower_class, config = _tower_class_and_config(kind, folder)
    options: dict[str, Any] = {
        "dtype": dtype,
        "attn_implementation": choose_attention(attention, device, dtype, tower_class),
    }
    options["device_map"] = {"": device}
    tower = read_model(tower_class, kind, folder, config=config, key_mapping=_TOWER_KEYS, **options)
    return vision_encoder(kind, tower, max_patches=max_patches, processor=read_processor(folder)).to(device)


def build_meta_vision(kind: str, folder: Path, *, dtype: torch.dtype, max_patches: int) -> Any:
    """Builds the encoder of `load_vision` on the meta device, for its sizes and its transform.

    Raises:
        UserError: The folder holds no such model.
    """
    if kind == "llava_next_video":
        return build_meta_encoder(folder, vision_options(read_config(folder), dtype))
    tower_class, config = _tower_class_and_config(kind, folder)
    with torch.device("meta"):
        tower = tower_class._from_config(config, dtype=dtype)
        return vision_encoder(kind, tower, max_patches=max_patches, processor=read_processor(folder))


def _tower_class_and_config(kind: str, folder: Path) -> tuple[Any, Any]:
    """Returns class and configuration of a Qwen model's tower."""
    import transformers

    _check_kind(kind, folder)
    model_class = getattr(transformers, FAMILIES[kind].class_name)
    # transformers does not export all of the tower classes.
    tower_class = getattr(sys.modules[model_class.__module__], FAMILIES[kind].tower_name)
    return tower_class, model_class.config_class.from_pretrained(folder).vision_config


def _check_kind(kind: str, folder: Path) -> None:
    """Raises a `UserError` if the folder holds a model of another kind."""
    found = read_config(folder).get("model_type")
    if found != kind:
        raise UserError(f"model.checkpoint {folder} is of type {found}, not {kind}; choose the model= of that type")


__all__ = ["VlmComponents", "build_meta_vision", "build_pretrained", "load_pretrained", "load_vision"]
