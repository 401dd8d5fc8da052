"""Fewer visual tokens in front of the projector.

Legend: B batch, F frames, P patches a frame (row-major over a grid h × w), Dv vision width.
"""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn


class PoolReducer(nn.Module):
    """Averages k × k neighbouring patches of each frame; windows that pass the edge of an odd grid average what is there.

    LLaVA-NeXT-Video pools 2 × 2 so: 576 patches become 144.

    Args:
        grid: (h, w) of the features.
        size: k.
    """

    def __init__(self, grid: tuple[int, int], size: int = 2) -> None:
        super().__init__()
        self.grid, self.size = grid, size

    def num_tokens(self, num_frames: int, num_patches: int) -> tuple[int, int]:
        """Frames and tokens a frame after pooling."""
        assert num_patches == self.grid[0] * self.grid[1]
        return num_frames, math.ceil(self.grid[0] / self.size) * math.ceil(self.grid[1] / self.size)

    def forward(self, features: Tensor) -> Tensor:
        """Pooled features, (B, F, P, Dv) -> (B, F, P', Dv)."""
        batch, frames, _, width = features.shape
        maps = features.reshape(batch * frames, *self.grid, width).permute(0, 3, 1, 2)
        pooled = F.avg_pool2d(maps, self.size, ceil_mode=True, count_include_pad=False)
        return pooled.flatten(2).transpose(1, 2).reshape(batch, frames, -1, width)


class FrameStack(nn.Module):
    """Concatenates the features of `size` consecutive frames at each position into one wider token.

    A token then holds how its place changes in time, which direction of motion needs; the number of visual tokens falls by `size`.
    Qwen2-VL's temporal patches join two frames in the same way, before the encoder (https://arxiv.org/abs/2409.12191).

    Args:
        size: Frames a stack; the number of frames must be a multiple of it.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def num_tokens(self, num_frames: int, num_patches: int) -> tuple[int, int]:
        """Stacks and tokens a stack."""
        assert num_frames % self.size == 0
        return num_frames // self.size, num_patches

    def forward(self, features: Tensor) -> Tensor:
        """Stacked features, (B, F, P, Dv) -> (B, F / size, P, size · Dv)."""
        batch, frames, patches, width = features.shape
        groups = features.reshape(batch, frames // self.size, self.size, patches, width)
        return groups.permute(0, 1, 3, 2, 4).reshape(batch, frames // self.size, patches, self.size * width)
