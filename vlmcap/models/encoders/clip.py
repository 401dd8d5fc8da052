"""CLIP's vision tower (Radford et al., https://arxiv.org/abs/2103.00020)."""

from __future__ import annotations

from typing import Any

from vlmcap.models.encoders.base import Family
from vlmcap.models.encoders.processor import Preprocessing


class Clip(Family):
    """Of CLIP itself, and of LLaVA's checkpoints."""

    model_type = "clip_vision_model"
    preprocessing = Preprocessing((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711), is_cropped=True)
    final_norm = "post_layernorm"
    interpolates_on_request = True

    def num_prefix_tokens(self, config: Any) -> int:
        """CLS."""
        return 1
