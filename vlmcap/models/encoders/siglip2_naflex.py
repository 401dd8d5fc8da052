"""SigLIP 2's NaFlex tower for native aspect ratios.

Source: Tschannen et al., https://arxiv.org/abs/2502.14786, section 2.4.2.

Legend: N frames of all clips, P patches per frame (padded), p side of a patch, Dv vision width.
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
    """An encoder of frames that are split into patches with a grid of their aspect ratio.

    Its `grid` is that of a square frame.
    """

    has_flash = False

    @property
    def num_patches(self) -> int:
        """P, the maximum patches per frame."""
        assert isinstance(self.transform, PatchTransform)
        return self.transform.max_patches

    def possible_grids(self, num_frames: int) -> Sequence[GridTHW]:
        """Returns all grids that fill the budget, in which a further row and column would not fit."""
        budget = self.num_patches
        sides = range(1, budget + 1)
        # A grid with room for another row and column would not be chosen.
        return [(num_frames, h, w) for h in sides for w in sides if h * w <= budget < (h + 1) * (w + 1)]

    def encode(self, frames: Tensor, sizes: Sequence[tuple[int, int]]) -> Tensor:
        """Encodes frames to patch features, uint8 (N, P, 3 · p · p) -> (N, P, Dv), with zeros for padding.

        Args:
            frames: Row-major patches, then padding.
            sizes: Patch rows and columns of each frame.
        """
        lengths = [height * width for height, width in sizes]
        # Patches beyond the longest frame of the batch are padding, and are not encoded.
        longest = max(lengths)
        # (N, P, 3 · p · p) -> (N, longest, p · p, 3)
        pixels = frames[:, :longest].unflatten(-1, (-1, 3)).to(self.mean.dtype)
        pixels = (pixels - self.mean.flatten()) / self.std.flatten()
        is_real = bias = None
        if min(lengths) < longest:
            is_real = torch.arange(longest, device=frames.device) < on_device(lengths, frames.device)[:, None]
            # An additive bias: for a bool mask, the class would synchronise to find out whether anything is masked.
            bias = torch.zeros(is_real.shape, dtype=self._dtype, device=frames.device).masked_fill(
                ~is_real, torch.finfo(self._dtype).min
            )
            bias = bias[:, None, None].expand(-1, 1, longest, -1)  # (N, longest) -> (N, 1, longest, longest)
        hidden: Tensor = self.tower(
            pixel_values=pixels.flatten(-2).to(self._dtype),
            pixel_attention_mask=bias,
            # The class reads single numbers: a numpy array needs no synchronisation, and works with fake tensors.
            spatial_shapes=np.array(sizes),
        ).last_hidden_state
        if is_real is not None:
            hidden = hidden.masked_fill(~is_real[..., None], 0)
        return F.pad(hidden, (0, 0, 0, frames.shape[1] - longest))  # (N, longest, Dv) -> (N, P, Dv)


class Siglip2Naflex(Family):
    """SigLIP 2 NaFlex."""

    preprocessing = Preprocessing((0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bilinear")
    is_raw = True
    has_flash = False

    def config_values(self, values: Mapping[str, Any]) -> Mapping[str, Any]:
        """Disables the pooling head."""
        return {**values, "vision_use_head": False}

    def layout(self, config: Any) -> Layout:
        """Returns the known layout, as the class takes patches and cannot be probed with images."""
        return Layout(int(config.patch_size), num_prefix_tokens=0, embed_dim=int(config.hidden_size))

    def final_norm(self, config: Any) -> FinalNorm | None:
        """Returns the known norm, for the same reason."""
        return FinalNorm("post_layernorm", is_counted=False)

    def assemble(
        self, tower: nn.Module, config: Any, options: EncoderOptions, preprocessing: Preprocessing
    ) -> VisionEncoder:
        """Builds the encoder around a tower.

        Raises:
            UserError: A fixed size or tiles are requested.
        """
        if options.image_size is not None:
            raise UserError(
                "encoder.image_size is not supported by a NaFlex encoder, whose frames keep their aspect ratio; set "
                "encoder.max_patches instead"
            )
        if options.max_tiles > 1:
            raise UserError(
                "encoder.tiling is not supported by a NaFlex encoder, whose frames keep their aspect ratio; raise "
                "encoder.max_patches instead"
            )
        # The side of the largest square within the budget.
        side = math.isqrt(options.max_patches)
        return NaflexEncoder(
            tower,
            transform=PatchTransform(int(config.patch_size), options.max_patches, preprocessing.resampling),
            preprocessing=preprocessing,
            grid=(side, side),
            feature_layer=options.feature_layer,
            embed_dim=int(config.hidden_size),
        )
