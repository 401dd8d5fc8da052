"""Vision encoders: frames in, patch features out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vlmcap.models.encoders.base import EncoderOptions, Family, VisionEncoder
from vlmcap.models.encoders.families import FAMILIES
from vlmcap.models.encoders.preprocessing import FrameTransform, Transform, read_processor
from vlmcap.models.encoders.tower import build_tower, load_tower, read_config, vision_config

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def load_encoder(family: str, folder: Path, options: EncoderOptions) -> VisionEncoder:
    """The vision encoder in `folder`, frozen; of a whole checkpoint (CLIP, SigLIP, LLaVA, InternVL) only the tower is read.

    Args:
        family: A key of `FAMILIES`.
        folder: Checkpoint in Hugging Face layout.
        options: What is chosen.

    Raises:
        UserError: The checkpoint is another family's or incomplete, or an option is impossible for it.
    """
    kind = FAMILIES[family]
    config = vision_config(kind, read_config(folder), f"encoder.checkpoint {folder}")
    tower = load_tower(kind, config, folder, options)
    encoder = kind.assemble(tower, config, options, kind.preprocessing.updated(read_processor(folder)))
    return encoder.requires_grad_(False).eval()


def sketch_encoder(family: str, folder: Path, options: EncoderOptions) -> VisionEncoder:
    """The same encoder without its weights, on the meta device: its sizes and its transform, out of the configuration files alone.

    Args:
        family: A key of `FAMILIES`.
        folder: Checkpoint in Hugging Face layout.
        options: What is chosen.

    Raises:
        UserError: The checkpoint is another family's, or an option is impossible for it.
    """
    kind = FAMILIES[family]
    config = vision_config(kind, read_config(folder), f"encoder.checkpoint {folder}")
    with torch.device("meta"):
        tower = build_tower(kind, config, options)
        encoder = kind.assemble(tower, config, options, kind.preprocessing.updated(read_processor(folder)))
    return encoder.requires_grad_(False).eval()


def build_encoder(
    family: str,
    config: Mapping[str, Any] | PretrainedConfig,
    options: EncoderOptions,
    *,
    processor: Mapping[str, Any] | None = None,
) -> VisionEncoder:
    """The encoder of a configuration with random weights, frozen; without any under `torch.device("meta")`.

    Args:
        family: A key of `FAMILIES`.
        config: A `config.json`, or transformers' object, of the tower or of a whole model.
        options: What is chosen.
        processor: Content of a processor file; None leaves the family's values.

    Raises:
        UserError: The configuration is another family's, or an option is impossible for it.
    """
    kind = FAMILIES[family]
    values = config if isinstance(config, Mapping) else config.to_dict()
    vision = vision_config(kind, values, "this configuration")
    tower = build_tower(kind, vision, options)
    encoder = kind.assemble(tower, vision, options, kind.preprocessing.updated(processor or {}))
    return encoder.requires_grad_(False).eval()


__all__ = [
    "FAMILIES",
    "EncoderOptions",
    "Family",
    "FrameTransform",
    "Transform",
    "VisionEncoder",
    "build_encoder",
    "load_encoder",
    "sketch_encoder",
]
