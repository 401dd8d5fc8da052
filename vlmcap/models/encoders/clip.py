"""CLIP's vision tower (Radford et al., https://arxiv.org/abs/2103.00020)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from vlmcap.models.encoders.base import Normalization, VisionEncoder, load_tower, read_processor

_NORMALIZATION = Normalization((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


def load_clip(folder: Path, *, feature_layer: int, dtype: torch.dtype) -> VisionEncoder:
    """The vision tower of a CLIP checkpoint; its text tower, if there, stays on disk."""
    from transformers import CLIPVisionModel

    tower: Any = load_tower(CLIPVisionModel, folder, dtype)
    size, patch = int(tower.config.image_size), int(tower.config.patch_size)
    transform, normalization = read_processor(folder, size, _NORMALIZATION, is_cropped=True)
    return VisionEncoder(
        tower,
        transform=transform,
        normalization=normalization,
        grid=(size // patch, size // patch),
        num_prefix_tokens=1,  # CLS
        feature_layer=feature_layer,
    )
