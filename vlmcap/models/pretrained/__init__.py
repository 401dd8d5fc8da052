"""Whole pretrained vision-language models behind the interface of assembled ones."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from vlmcap.errors import UserError
from vlmcap.models.encoders.tower import read_config
from vlmcap.models.pretrained.llava import build_llava, load_llava
from vlmcap.models.pretrained.parts import PretrainedParts
from vlmcap.models.pretrained.qwen_vl import build_qwen_vl, load_qwen_vl
from vlmcap.models.pretrained.vision import load_vision, sketch_vision


def load_pretrained(
    kind: str, folder: Path, *, dtype: torch.dtype, quantization: str, attention: str, device: str, max_patches: int
) -> PretrainedParts:
    """A whole model taken apart: encoder and language model frozen, projector in float32.

    Args:
        kind: "llava_next_video", "qwen2_vl", "qwen2_5_vl" or "qwen3_vl".
        folder: Checkpoint in Hugging Face layout; its own code is never run.
        dtype: Of unquantised weights, and of the arithmetic on quantised ones.
        quantization: Of the language part: "none", "8bit" or "4bit".
        attention: As `choose_attention` takes it.
        device: Where the model will run, such as "cpu" or "cuda:0"; quantised weights are put there while loading.
        max_patches: Patches a frame at most, for the Qwen family; LLaVA's frames have one size.

    Raises:
        UserError: The folder holds another model, or only a part of one.
    """
    found = read_config(folder).get("model_type")
    if found != kind:
        raise UserError(f"model.checkpoint {folder} is of type {found}, not {kind}; choose the model= that fits it")
    if kind == "llava_next_video":
        return load_llava(folder, dtype=dtype, quantization=quantization, attention=attention, device=device)
    return load_qwen_vl(kind, folder, dtype=dtype, quantization=quantization, attention=attention, device=device, max_patches=max_patches)


def build_pretrained(kind: str, config: Mapping[str, Any], *, dtype: torch.dtype, max_patches: int) -> PretrainedParts:
    """The parts of a `config.json` with random weights; without any under `torch.device("meta")`."""
    if kind == "llava_next_video":
        return build_llava(config, dtype=dtype)
    return build_qwen_vl(kind, config, dtype=dtype, max_patches=max_patches)


__all__ = ["PretrainedParts", "build_pretrained", "load_pretrained", "load_vision", "sketch_vision"]
