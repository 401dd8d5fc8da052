"""What a user's own encoder derives from: frames of one size, a grid of patches, no tower of transformers.

Legend: B batch, F frames, N frames of all clips, P patches per frame, Dv vision width, S side of a frame in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vlmcap.models.encoders.base import VisionEncoder
from vlmcap.models.encoders.preprocessing import FrameTransform


class FrameEncoder(VisionEncoder):
    """Base of encoders that look at each frame by itself; a subclass has layers of its own and `features`.

    Args:
        embed_dim: Dv.
        grid: (h, w) patches of a frame.
        image_size: S, to which the data workers resize frames.
        resampling: "bicubic" or "bilinear".
    """

    def __init__(self, *, embed_dim: int, grid: tuple[int, int], image_size: int, resampling: str = "bicubic") -> None:
        nn.Module.__init__(self)
        self.embed_dim, self.grid, self.max_tiles = embed_dim, grid, 1
        self.transform: FrameTransform = FrameTransform(image_size, resampling)
        self.feature_layer, self.num_prefix_tokens = -1, 0

    def features(self, pixels: Tensor) -> Tensor:
        """Patch features of frames, row by row over the grid.

        Args:
            pixels: (N, 3, S, S) from 0 to 1, of the type of the weights.

        Returns:
            (N, P, Dv).
        """
        raise NotImplementedError

    def encode(self, frames: Tensor, sizes: Sequence[tuple[int, int]]) -> Tensor:
        """Patch features of single frames, uint8 (N, 3, S, S) -> (N, P, Dv)."""
        floats = (tensor.dtype for tensor in (*self.parameters(), *self.buffers()) if tensor.is_floating_point())
        patches = self.features(frames.to(next(floats, torch.float32)) / 255)
        assert patches.shape[1:] == (self.num_patches, self.embed_dim), f"features gives {tuple(patches.shape)}"
        return patches

    @property
    def tower(self) -> Any:  # type: ignore[override]
        """What is tuned: the whole encoder."""
        return self

    def gradient_checkpointing_enable(self, **_: Any) -> None:
        """Keeps all activations, as there are no blocks that are known."""
