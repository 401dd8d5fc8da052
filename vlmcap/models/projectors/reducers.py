"""Fewer visual tokens in front of the projector, still on a grid.

Legend: B batch, F frames, P patches a frame (row-major over a grid h × w), Dv vision width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmcap.models.projectors.resampling import Grid, resize_grid


class PoolReducer(nn.Module):
    """Averages k × k neighbouring patches of each frame; windows that pass the edge of an odd grid average what is there.

    LLaVA-NeXT-Video pools 2 × 2 so: 576 patches become 144.

    Args:
        size: k.
    """

    def __init__(self, size: int = 2) -> None:
        super().__init__()
        self.size = size

    def forward(self, features: Tensor, grid: Grid) -> Tensor:
        """Pooled features, (B, F, P, Dv) -> (B, F, P', Dv)."""
        maps = features.flatten(0, 1).transpose(1, 2).unflatten(2, grid)
        pooled = F.avg_pool2d(maps, self.size, ceil_mode=True, count_include_pad=False)
        return pooled.flatten(2).transpose(1, 2).unflatten(0, features.shape[:2])


class ResampleReducer(nn.Module):
    """Brings each frame to a square of size × size tokens by antialiased bilinear interpolation, whatever its grid.

    Args:
        size: Side of the square.
    """

    def __init__(self, size: int = 12) -> None:
        super().__init__()
        self.size = size

    def forward(self, features: Tensor, grid: Grid) -> Tensor:
        """Resampled features, (B, F, P, Dv) -> (B, F, size², Dv)."""
        return resize_grid(features, grid, (self.size, self.size))


def stack_frames(features: Tensor, size: int) -> Tensor:
    """Features of `size` consecutive frames at each place joined into one wider token, (B, F, P, Dv) -> (B, ⌈F / size⌉, P, size · Dv).

    The last frame of a clip, or an image, is repeated until it fills a stack. A token then holds how its place changes in time, which
    direction of motion needs; the number of visual tokens falls by `size`. Qwen2-VL's temporal patches join two frames in the same way,
    before the encoder (https://arxiv.org/abs/2409.12191).
    """
    if missing := -features.shape[1] % size:
        features = torch.cat([features, features[:, -1:].expand(-1, missing, -1, -1)], dim=1)
    return features.unflatten(1, (-1, size)).transpose(2, 3).flatten(3)
