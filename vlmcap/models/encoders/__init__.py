"""Vision encoders, which map frames to patch features."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from vlmcap.errors import UserError
from vlmcap.models.encoders.base import EncoderOptions, Family, VisionEncoder
from vlmcap.models.encoders.classes import set_depth
from vlmcap.models.encoders.families import family_of
from vlmcap.models.encoders.preprocessing import (
    FrameTransform,
    Preprocessing,
    Transform,
    preprocessing_of,
    read_processor,
    timm_processor,
)
from vlmcap.models.encoders.tower import build_tower, load_tower, read_config, vision_config

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def load_encoder(folder: Path, options: EncoderOptions, device: str = "cpu") -> VisionEncoder:
    """Loads the vision encoder in `folder`, frozen.

    From a larger checkpoint (CLIP, SigLIP, LLaVA, InternVL, …), only the vision tower is read.

    Args:
        folder: Checkpoint in Hugging Face layout with any vision tower of transformers that returns a grid of patch
            features.
        options: Options of the encoder.
        device: Device that weights are read to, such as "cpu" or "cuda:0".

    Raises:
        UserError: The checkpoint has no such tower or is incomplete, or an option is not possible for it.
    """
    source = f"encoder.checkpoint {folder}"
    family, config = vision_config(read_config(folder), source)
    tower = load_tower(family, config, folder, options, device)
    return _assemble(family, tower, config, options, read_processor(folder), source).to(device)


def build_meta_encoder(folder: Path, options: EncoderOptions) -> VisionEncoder:
    """Builds the encoder in `folder` on the meta device, from its configuration files only.

    Args:
        folder: Checkpoint in Hugging Face layout.
        options: Options of the encoder.

    Raises:
        UserError: The checkpoint has no vision tower with a grid of patch features, or an option is not possible.
    """
    source = f"encoder.checkpoint {folder}"
    family, config = vision_config(read_config(folder), source)
    with torch.device("meta"):
        tower = build_tower(family, config, options, source)
        return _assemble(family, tower, config, options, read_processor(folder), source)


def build_encoder(
    config: Mapping[str, Any] | PretrainedConfig,
    options: EncoderOptions,
    *,
    processor: Mapping[str, Any] | None = None,
    num_blocks: int | None = None,
) -> VisionEncoder:
    """Builds an encoder from a configuration, frozen, with random weights; under `torch.device("meta")` without any.

    Args:
        config: Content of a `config.json`, or transformers' configuration, of the tower or of a larger model.
        options: Options of the encoder.
        processor: Content of a processor file; None uses the values of transformers' processor.
        num_blocks: Number of blocks, overriding the configuration, before truncation after the chosen layer.

    Raises:
        UserError: The configuration has no vision tower with a grid of patch features, or an option is not possible.
    """
    source = "this configuration"
    family, vision = vision_config(config if isinstance(config, Mapping) else config.to_dict(), source)
    # Fewer blocks are enough to measure one of them.
    if num_blocks is not None:
        set_depth(vision, num_blocks)
    return _assemble(family, build_tower(family, vision, options, source), vision, options, processor or {}, source)


def default_preprocessing(model_type: str) -> Preprocessing:
    """Returns the preprocessing for a type of tower without a processor file.

    Mean and std are empty if transformers does not define them.
    """
    return family_of(model_type).preprocessing or preprocessing_of(model_type)


def _assemble(
    family: Family, tower: nn.Module, config: Any, options: EncoderOptions, processor: Mapping[str, Any], source: str
) -> VisionEncoder:
    """Builds the frozen encoder; options have priority over the processor file, and this over the defaults."""
    # Checkpoints of timm state their preprocessing in config.json and have no processor file.
    timm = timm_processor(getattr(config, "pretrained_cfg", None) or {})
    preprocessing = default_preprocessing(config.model_type).updated(processor or timm)
    preprocessing = replace(
        preprocessing, mean=options.mean or preprocessing.mean, std=options.std or preprocessing.std
    )
    if len(preprocessing.mean) != 3 or len(preprocessing.std) != 3:
        raise UserError(
            f"{source} has no preprocessor_config.json with a mean and a standard deviation for three channels, and "
            f"none is known for '{config.model_type}'; set encoder.image_mean and encoder.image_std, such as "
            "[0.5,0.5,0.5]"
        )
    encoder = family.assemble(tower, config, options, preprocessing)
    encoder.is_normed = options.is_normed
    return encoder.requires_grad_(False).eval()


__all__ = [
    "EncoderOptions",
    "Family",
    "FrameTransform",
    "Transform",
    "VisionEncoder",
    "build_encoder",
    "build_meta_encoder",
    "default_preprocessing",
    "load_encoder",
]
