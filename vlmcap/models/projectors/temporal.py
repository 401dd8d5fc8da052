"""Temporal modelling: what tells the frames of a clip apart.

Legend: B batch, F frames, P tokens a frame (row-major over a grid h × w), D width, Dl language width, h inner width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmcap.models.projectors.resampling import Grid, resize_grid


class FramePosition(nn.Module):
    """Adds a learned embedding of the frame's index and of the token's place in the frame.

    Args:
        dim: D.
        max_frames: Frames, or stacks of frames, of a clip.
        grid: (h, w) of the places; other grids interpolate them. None embeds frames alone.
        std: Of the embeddings at the start.
    """

    def __init__(self, dim: int, max_frames: int, grid: Grid | None, std: float = 0.02) -> None:
        super().__init__()
        self.grid = grid
        self.frame = nn.Parameter(torch.randn(max_frames, 1, dim) * std)
        self.place = nn.Parameter(torch.randn(1, grid[0] * grid[1], dim) * std) if grid else None

    def forward(self, tokens: Tensor, grid: Grid) -> Tensor:
        """(B, F, P, D) on `grid` -> (B, F, P, D)."""
        assert tokens.shape[1] <= len(self.frame), f"{tokens.shape[1]} frames, at most {len(self.frame)} expected"
        tokens = tokens + self.frame[: tokens.shape[1]]
        if self.place is None or self.grid is None:
            return tokens
        return tokens + resize_grid(self.place, self.grid, grid)


class NormalizedPosition(nn.Module):
    """LayerNorm, then `FramePosition`, in front of the projection: `temporal=position`, and the frame embedding of the perceiver.

    Standing in front, it lets the projector's own layers join what a token shows with where and when it does; from behind they could
    only be added, and left-and-early would look like right-and-late. The norm gives embeddings of any encoder a common scale.
    """

    def __init__(self, dim: int, max_frames: int, grid: Grid | None) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.position = FramePosition(dim, max_frames, grid, std=0.3)

    def forward(self, tokens: Tensor, grid: Grid) -> Tensor:
        """(B, F, P, D) on `grid` -> (B, F, P, D)."""
        placed: Tensor = self.position(self.norm(tokens), grid)
        return placed


class TemporalAttention(nn.Module):
    """Self-attention along time for each place, with residual: divided space-time attention's temporal half.

    Source: Bertasius et al., "Is Space-Time Attention All You Need for Video Understanding?", https://arxiv.org/abs/2102.05095.

    Args:
        dim: Dl.
        hidden_dim: h, a multiple of `num_heads`.
        num_heads: Attention heads.
        max_frames: Length of the learned frame embedding.
        grid: (h, w) of the places of a frame.
    """

    def __init__(self, dim: int, *, hidden_dim: int, num_heads: int, max_frames: int, grid: Grid) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.position = FramePosition(dim, max_frames, grid)
        self.norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * hidden_dim)
        self.out = nn.Linear(hidden_dim, dim)

    def forward(self, tokens: Tensor, grid: Grid) -> Tensor:
        """(B, F, P, Dl) on `grid` -> (B, F, P, Dl)."""
        tokens = self.position(tokens, grid)
        columns = self.qkv(self.norm(tokens)).transpose(1, 2).flatten(0, 1)
        query, key, value = columns.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        return tokens + self.out(mixed).unflatten(0, (len(tokens), -1)).transpose(1, 2)
