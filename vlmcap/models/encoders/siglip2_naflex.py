"""SigLIP 2's tower for native aspect ratios, NaFlex (Tschannen et al., https://arxiv.org/abs/2502.14786, section 2.4.2).

Legend: N frames of all clips, P patches a frame (padded), p side of a patch, Dv vision width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmcap.errors import UserError
from vlmcap.models.encoders.base import EncoderOptions, Family, VisionEncoder, on_device
from vlmcap.models.encoders.layout import FinalNorm, Layout
from vlmcap.models.encoders.preprocessing import PatchTransform, Preprocessing
from vlmcap.types import GridTHW


class NaflexEncoder(VisionEncoder):
    """An encoder whose frames come as patches, as many as their aspect ratio asks for.

    Its `grid` is that of a square frame.
    """

    has_flash = False

    @property
    def num_patches(self) -> int:
        """P, the budget."""
        assert isinstance(self.transform, PatchTransform)
        return self.transform.max_patches

    def possible_grids(self, num_frames: int) -> Sequence[GridTHW]:
        """Every grid that fills the budget: not both a row and a column more would fit in it."""
        budget = self.num_patches
        sides = range(1, budget + 1)
        return [(num_frames, h, w) for h in sides for w in sides if h * w <= budget < (h + 1) * (w + 1)]

    def encode(self, frames: Tensor, sizes: Sequence[tuple[int, int]]) -> Tensor:
        """Patch features, uint8 (N, P, 3 · p · p) -> (N, P, Dv), zero behind a frame's last patch.

        Args:
            frames: Patches, row-major, then padding.
            sizes: Patch rows and columns of each frame.
        """
        lengths = [height * width for height, width in sizes]
        used = max(lengths)
        pixels = (
            frames[:, :used].unflatten(-1, (-1, 3)).to(self.mean.dtype) - self.mean.flatten()
        ) / self.std.flatten()
        is_real = bias = None
        if min(lengths) < used:
            is_real = torch.arange(used, device=frames.device) < on_device(lengths, frames.device)[:, None]
            # In the form that attention adds: from a plain mask the class would ask the device whether anything is
            # masked, and wait.
            bias = torch.zeros(is_real.shape, dtype=self._dtype, device=frames.device).masked_fill(
                ~is_real, torch.finfo(self._dtype).min
            )
            bias = bias[:, None, None].expand(-1, 1, used, -1)
        hidden: Tensor = self.tower(
            pixel_values=pixels.flatten(-2).to(self._dtype),
            pixel_attention_mask=bias,
            # The class reads them number by number: an array makes no device wait, and lets the model be traced without
            # values.
            spatial_shapes=np.array(sizes),
        ).last_hidden_state
        if is_real is not None:
            hidden = hidden.masked_fill(~is_real[..., None], 0)
        return F.pad(hidden, (0, 0, 0, frames.shape[1] - used))


class Siglip2Naflex(Family):
    """SigLIP 2, NaFlex."""

    preprocessing = Preprocessing((0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bilinear")
    is_raw = True
    has_flash = False

    def config_values(self, values: Mapping[str, Any]) -> Mapping[str, Any]:
        """Without the pooling head."""
        return {**values, "vision_use_head": False}

    def layout(self, config: Any) -> Layout:
        """As its class takes patches and no pictures."""
        return Layout(int(config.patch_size), num_prefix_tokens=0, embed_dim=int(config.hidden_size))

    def final_norm(self, config: Any) -> FinalNorm | None:
        """Likewise."""
        return FinalNorm("post_layernorm", is_counted=False)

    def assemble(
        self, tower: nn.Module, config: Any, options: EncoderOptions, preprocessing: Preprocessing
    ) -> VisionEncoder:
        """The encoder around a tower.

        Raises:
            UserError: A fixed size or tiles are asked for.
        """
        if options.image_size is not None:
            raise UserError(
                "encoder.image_size does not go with a NaFlex encoder, whose frames keep their shape; set "
                "encoder.max_patches"
            )
        if options.max_tiles > 1:
            raise UserError(
                "encoder.tiling does not go with a NaFlex encoder, whose frames keep their shape; raise "
                "encoder.max_patches"
            )
        side = math.isqrt(options.max_patches)
        return NaflexEncoder(
            tower,
            transform=PatchTransform(int(config.patch_size), options.max_patches, preprocessing.resampling),
            preprocessing=preprocessing,
            grid=(side, side),
            feature_layer=options.feature_layer,
            embed_dim=int(config.hidden_size),
        )
