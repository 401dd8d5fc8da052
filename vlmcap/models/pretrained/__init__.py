"""Pretrained VLMs with the interface of assembled models, and their vision encoders alone.

A vision encoder alone fills the feature cache, or states its sizes on the meta device.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from vlmcap.config import TimedVlmConfig
from vlmcap.errors import UserError
from vlmcap.models.encoders import build_meta_encoder, load_encoder
from vlmcap.models.encoders.preprocessing import read_processor
from vlmcap.models.encoders.tower import read_config
from vlmcap.models.pretrained.components import VlmComponents
from vlmcap.models.pretrained.families import FAMILIES, family_of
from vlmcap.models.pretrained.frames import build_frames, load_frames, vision_options
from vlmcap.models.pretrained.qwen_vl import (
    build_patches,
    build_qwen_vl,
    load_patches,
    load_qwen_vl,
    load_tower,
    tower_class_and_config,
    vision_encoder,
)


def load_pretrained(
    folder: Path,
    *,
    dtype: torch.dtype,
    quantization: str,
    attention: str,
    device: str,
    max_patches: int,
    use_outer_marks: bool = TimedVlmConfig.use_outer_marks,
    is_on_host: bool = False,
) -> VlmComponents:
    """Loads a pretrained VLM and splits it into components: frozen encoder and language model, float32 projector.

    Args:
        folder: Checkpoint in Hugging Face layout; its own code is never run.
        dtype: Dtype of unquantised weights, and of the arithmetic on quantised ones.
        quantization: Quantisation of the language model: "none", "8bit" or "4bit".
        attention: Requested attention, as for `choose_attention`.
        device: Device that the model will run on, such as "cpu" or "cuda:0"; weights are loaded to it.
        is_on_host: Whether unquantised weights stay in host memory, for a model that will be sharded.
        max_patches: Maximum patches per frame where frames keep their aspect ratio.
        use_outer_marks: Whether an outer pair `<|vision_start|>…<|vision_end|>` surrounds Qwen3-VL's frames, as in its
            processor since transformers 5.10; other models always have one pair.

    Raises:
        UserError: The folder holds an unsupported model, or an incomplete one.
    """
    language: dict[str, Any] = {"dtype": dtype, "quantization": quantization, "attention": attention, "device": device}
    language["is_on_host"] = is_on_host
    kind = family_of(read_config(folder).get("model_type")).kind
    if kind == "frames":
        return load_frames(folder, **language)
    if kind == "patches":
        return load_patches(folder, **language, max_patches=max_patches)
    return load_qwen_vl(folder, **language, max_patches=max_patches, use_outer_marks=use_outer_marks)


def build_pretrained(
    config: Mapping[str, Any],
    *,
    dtype: torch.dtype,
    max_patches: int,
    use_outer_marks: bool = TimedVlmConfig.use_outer_marks,
) -> VlmComponents:
    """Builds the components of a `config.json` on the meta device.

    Raises:
        UserError: The configuration is that of an unsupported model.
    """
    with torch.device("meta"):
        kind = family_of(config.get("model_type")).kind
        if kind == "frames":
            return build_frames(config, dtype=dtype)
        if kind == "patches":
            return build_patches(config, dtype=dtype, max_patches=max_patches)
        return build_qwen_vl(config, dtype=dtype, max_patches=max_patches, use_outer_marks=use_outer_marks)


def load_vision(folder: Path, *, dtype: torch.dtype, attention: str, device: str, max_patches: int) -> Any:
    """Loads the vision encoder of a pretrained VLM, frozen, with the interface of `VisionEncoder`.

    The language model is not read.

    Args:
        folder: Checkpoint in Hugging Face layout.
        dtype: Dtype of the weights.
        attention: Requested attention, as for `choose_attention`.
        device: Device that the encoder will run on; weights are loaded to it.
        max_patches: Maximum patches per frame where frames keep their aspect ratio.

    Raises:
        UserError: The folder holds an unsupported model, or an incomplete tower.
    """
    config = read_config(folder)
    # Square frames of one size: an ordinary encoder reads the tower out of the checkpoint.
    if _has_frames(config):
        return load_encoder(folder, vision_options(config, dtype), device)
    tower = load_tower(folder, dtype=dtype, attention=attention, device=device)
    processor = read_processor(folder)
    return vision_encoder(config["model_type"], tower, max_patches=max_patches, processor=processor).to(device)


def build_meta_vision(folder: Path, *, dtype: torch.dtype, max_patches: int) -> Any:
    """Builds the encoder of `load_vision` on the meta device, for its sizes and its transform.

    Raises:
        UserError: The folder holds an unsupported model.
    """
    config = read_config(folder)
    if _has_frames(config):
        return build_meta_encoder(folder, vision_options(config, dtype))
    tower_class, vision = tower_class_and_config(config)
    with torch.device("meta"):
        tower = tower_class._from_config(vision, dtype=dtype)
        processor = read_processor(folder)
        return vision_encoder(config["model_type"], tower, max_patches=max_patches, processor=processor)


def check_kind(kind: str, folder: Path) -> None:
    """Checks that the folder holds a model of a kind, whose settings the run has.

    Raises:
        UserError: It holds a model of another kind, or an unsupported one.
    """
    model_type = read_config(folder).get("model_type")
    if family_of(model_type).kind != kind:
        raise UserError(
            f"model.checkpoint {folder} is of type {model_type}, whose settings are not those of model.kind={kind}; "
            "set model=custom"
        )


def _has_frames(config: Mapping[str, Any]) -> bool:
    return family_of(config.get("model_type")).kind == "frames"


__all__ = [
    "FAMILIES",
    "VlmComponents",
    "build_meta_vision",
    "build_pretrained",
    "check_kind",
    "family_of",
    "load_pretrained",
    "load_vision",
]
