"""SigLIP's vision tower, as SigLIP 2's fixed-resolution checkpoints use it (Tschannen et al., https://arxiv.org/abs/2502.14786)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from vlmcap.models.encoders.base import Normalization, VisionEncoder, load_tower, read_processor

_NORMALIZATION = Normalization((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def load_siglip(folder: Path, *, feature_layer: int, dtype: torch.dtype) -> VisionEncoder:
    """The vision tower of a SigLIP or fixed-resolution SigLIP 2 checkpoint."""
    from transformers import SiglipVisionModel

    tower: Any = load_tower(SiglipVisionModel, folder, dtype)
    size, patch = int(tower.config.image_size), int(tower.config.patch_size)
    transform, normalization = read_processor(folder, size, _NORMALIZATION, is_cropped=False)
    return VisionEncoder(
        tower,
        transform=transform,
        normalization=normalization,
        grid=(size // patch, size // patch),
        num_prefix_tokens=0,  # SigLIP has no CLS
        feature_layer=feature_layer,
    )
