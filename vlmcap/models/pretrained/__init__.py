"""Whole pretrained vision-language models behind the interface of assembled ones, or their vision encoder alone.

The encoder alone fills a feature cache with its weights, or states its sizes without them.
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

# A tower's names in the files of published checkpoints, and in those that transformers 5 writes.
_OUT_OF_WHOLE = {r"^(?:model\.)?visual\.": ""}


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
    """A whole model taken apart: encoder and language model frozen, projector in float32.

    Args:
        kind: "llava_next_video", "qwen2_vl", "qwen2_5_vl" or "qwen3_vl".
        folder: Checkpoint in Hugging Face layout; its own code is never run.
        dtype: Of unquantised weights, and of the arithmetic on quantised ones.
        quantization: Of the language part: "none", "8bit" or "4bit".
        attention: As `choose_attention` takes it.
        device: Where the model will run, such as "cpu" or "cuda:0"; its weights are put there while loading.
        is_on_host: Leaves unquantised weights in host memory, for a model that is cut into shards.
        max_patches: Patches a frame at most, for the Qwen family; LLaVA's frames have one size.
        use_outer_marks: Whether an outer `<|vision_start|>…<|vision_end|>` stands around Qwen3-VL's frames, as its
            processor has it since transformers 5.10; other models have the one pair always.

    Raises:
        UserError: The folder holds another model, or only a part of one.
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
    """The parts of a `config.json` with random weights; without any under `torch.device("meta")`."""
    if kind == "llava_next_video":
        return build_llava(config, dtype=dtype)
    return build_qwen_vl(kind, config, dtype=dtype, max_patches=max_patches, use_outer_marks=use_outer_marks)


def load_vision(kind: str, folder: Path, *, dtype: torch.dtype, attention: str, device: str, max_patches: int) -> Any:
    """The vision encoder of a whole model, frozen, with the interface of `VisionEncoder`.

    The language model is not read.

    Args:
        kind: As `load_pretrained` takes it.
        folder: Checkpoint in Hugging Face layout.
        dtype: Of the weights.
        attention: As `choose_attention` takes it.
        device: Where it will run; its weights are put there while they are read.
        max_patches: Patches a frame at most, for the Qwen family.

    Raises:
        UserError: The folder holds no such model, or only a part of its tower.
    """
    if kind == "llava_next_video":
        return load_encoder(folder, vision_options(read_config(folder), dtype), device)
    tower_class, config = _tower_of(kind, folder)
    options: dict[str, Any] = {
        "dtype": dtype,
        "attn_implementation": choose_attention(attention, device, dtype, tower_class),
    }
    options["device_map"] = {"": device}
    tower = read_model(tower_class, kind, folder, config=config, key_mapping=_OUT_OF_WHOLE, **options)
    return vision_encoder(kind, tower, max_patches=max_patches, processor=read_processor(folder)).to(device)


def build_meta_vision(kind: str, folder: Path, *, dtype: torch.dtype, max_patches: int) -> Any:
    """The same encoder without its weights, on the meta device: its sizes and its transform.

    Raises:
        UserError: The folder holds no such model.
    """
    if kind == "llava_next_video":
        return build_meta_encoder(folder, vision_options(read_config(folder), dtype))
    tower_class, config = _tower_of(kind, folder)
    with torch.device("meta"):
        tower = tower_class._from_config(config, dtype=dtype)
        return vision_encoder(kind, tower, max_patches=max_patches, processor=read_processor(folder))


def _tower_of(kind: str, folder: Path) -> tuple[Any, Any]:
    """Class and configuration of a Qwen model's tower."""
    import transformers

    _check_kind(kind, folder)
    model_class = getattr(transformers, FAMILIES[kind].class_name)
    # Not all of the towers' classes are among the names that the package itself offers.
    tower_class = getattr(sys.modules[model_class.__module__], FAMILIES[kind].tower_name)
    return tower_class, model_class.config_class.from_pretrained(folder).vision_config


def _check_kind(kind: str, folder: Path) -> None:
    """`UserError` if the folder holds a model of another kind."""
    found = read_config(folder).get("model_type")
    if found != kind:
        raise UserError(f"model.checkpoint {folder} is of type {found}, not {kind}; choose the model= that fits it")


__all__ = ["VlmComponents", "build_meta_vision", "build_pretrained", "load_pretrained", "load_vision"]
