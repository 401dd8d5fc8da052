"""DINOv3's vision tower (Siméoni et al., https://arxiv.org/abs/2508.10104)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from vlmcap.models.encoders.base import Family
from vlmcap.models.encoders.processor import Preprocessing


class Dinov3(Family):
    """DINOv3 ViT of every size; positions are rotary, so any multiple of the patch will do."""

    model_type = "dinov3_vit"
    preprocessing = Preprocessing((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "bilinear")
    final_norm = "norm"
    is_normed = True
    is_rotary = True

    def config_values(self, values: Mapping[str, Any]) -> Mapping[str, Any]:
        """Without the random positions of its pre-training, which its class adds in training mode."""
        return {**values, "pos_embed_shift": None, "pos_embed_jitter": None, "pos_embed_rescale": None}

    def names(self, name: str) -> tuple[str, ...]:
        """Files have the blocks at the top, the class has them one level down."""
        return (re.sub(r"^(?:model\.)?layer\.", "model.layer.", name),)

    def num_prefix_tokens(self, config: Any) -> int:
        """CLS and registers."""
        return 1 + int(config.num_register_tokens)
