"""Base class for a user's own encoder, with frames of one size and a grid of patches, but no tower of transformers.

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
    """Base class of encoders that encode each frame independently; a subclass defines its layers and `features`.

    Args:
        embed_dim: Dv.
        grid: Patch grid (h, w) of a frame.
        image_size: S, to which the data workers resize frames.
        resampling: "bicubic" or "bilinear".
    """

    def __init__(self, *, embed_dim: int, grid: tuple[int, int], image_size: int, resampling: str = "bicubic") -> None:
        # Not the constructor of `VisionEncoder`, which needs a tower of transformers.
        nn.Module.__init__(self)
        self.embed_dim, self.grid, self.max_tiles = embed_dim, grid, 1
        self.transform: FrameTransform = FrameTransform(image_size, resampling)
        self.feature_layer, self.num_prefix_tokens = -1, 0

    def features(self, pixels: Tensor) -> Tensor:
        """Computes the patch features of frames, row-major over the grid.

        Args:
            pixels: (N, 3, S, S) in 0…1, in the dtype of the weights.

        Returns:
            (N, P, Dv).
        """
        raise NotImplementedError

    def encode(self, frames: Tensor, sizes: Sequence[tuple[int, int]]) -> Tensor:
        """Encodes single frames to patch features, uint8 (N, 3, S, S) -> (N, P, Dv)."""
        floats = (tensor.dtype for tensor in (*self.parameters(), *self.buffers()) if tensor.is_floating_point())
        # Without a normalisation: the features of a plugin take pixels in 0…1.
        patches = self.features(frames.to(next(floats, torch.float32)) / 255)
        assert patches.shape[1:] == (self.num_patches, self.embed_dim), f"features returned {tuple(patches.shape)}"
        return patches

    @property
    def tower(self) -> Any:  # type: ignore[override]
        """The module that is tuned: the encoder itself."""
        return self

    def gradient_checkpointing_enable(self, **_: Any) -> None:
        """Does nothing, as the blocks of the encoder are unknown: all activations are kept."""
