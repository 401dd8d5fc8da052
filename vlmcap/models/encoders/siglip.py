"""SigLIP's vision tower, as SigLIP 2's fixed-resolution checkpoints use it (Tschannen et al., https://arxiv.org/abs/2502.14786)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlmcap.models.encoders.base import Family
from vlmcap.models.encoders.processor import Preprocessing


class Siglip(Family):
    """SigLIP, and SigLIP 2 at a fixed resolution; it has no CLS token."""

    model_type = "siglip_vision_model"
    preprocessing = Preprocessing((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    final_norm = "post_layernorm"
    interpolates_on_request = True

    def config_values(self, values: Mapping[str, Any]) -> Mapping[str, Any]:
        """Without the pooling head."""
        return {**values, "vision_use_head": False}
