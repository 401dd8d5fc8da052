"""Honeybee's C-Abstractor: convolutions around a pooling, so that neighbours stay neighbours.

Legend: B batch, F frames, N = B · F, P patches a frame (row-major over a grid h × w), D width, C inner width, Dl language width.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmcap.models.projectors.base import Projection, TokenLayout
from vlmcap.models.projectors.resampling import pool_maps, resize_grid


class CAbstractorProjector(Projection):
    """Position, convolution blocks, pooling to a square, convolution blocks, then an MLP to Dl.

    Source: Cha et al., "Honeybee: Locality-enhanced Projector for Multimodal LLM", https://arxiv.org/abs/2312.06742.

    Args:
        in_dim: D.
        out_dim: Dl.
        grid: (h, w) that the position embedding is for; other grids interpolate it.
        hidden_dim: C.
        num_layers: Blocks on each side of the pooling.
        num_queries: Tokens a frame, a square number.
    """

    def __init__(self, in_dim: int, out_dim: int, *, grid: tuple[int, int], hidden_dim: int, num_layers: int, num_queries: int) -> None:
        super().__init__()
        self.grid, self.side = grid, math.isqrt(num_queries)
        self.position = nn.Parameter(torch.randn(1, grid[0] * grid[1], in_dim) * 0.02)
        widths = [in_dim] + [hidden_dim] * num_layers
        self.before = nn.Sequential(*(_ConvBlock(*pair) for pair in pairwise(widths)))
        self.after = nn.Sequential(*(_ConvBlock(hidden_dim, hidden_dim) for _ in range(num_layers)))
        self.readout = nn.Sequential(nn.Linear(hidden_dim, out_dim), nn.SiLU(), nn.Linear(out_dim, out_dim))

    def forward(self, tokens: Tensor, layout: TokenLayout) -> Tensor:
        """Tokens of the square, (B, F, P, D) -> (B, F, num_queries, Dl)."""
        tokens = tokens + resize_grid(self.position, self.grid, layout.grid)
        maps = tokens.flatten(0, 1).transpose(1, 2).unflatten(2, layout.grid)
        pooled = pool_maps(self.before(maps), self.side)
        projected: Tensor = self.readout(self.after(pooled).flatten(2).transpose(1, 2))
        return projected.unflatten(0, tokens.shape[:2])


class _ConvBlock(nn.Module):
    """RegNet's block with squeeze-and-excitation, (N, in, h, w) -> (N, out, h, w); the 3 × 3 convolution takes each channel alone."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.Conv2d(in_dim, out_dim, 1, bias=False),
            _ChannelNorm(out_dim),
            nn.SiLU(),
            nn.Conv2d(out_dim, out_dim, 3, padding=1, groups=out_dim, bias=False),
            _ChannelNorm(out_dim),
            nn.SiLU(),
            _SqueezeExcite(out_dim, max(1, in_dim // 4)),
            nn.Conv2d(out_dim, out_dim, 1, bias=False),
            _ChannelNorm(out_dim),
        )
        is_same = in_dim == out_dim
        self.shortcut = nn.Identity() if is_same else nn.Sequential(nn.Conv2d(in_dim, out_dim, 1, bias=False), _ChannelNorm(out_dim))

    def forward(self, maps: Tensor) -> Tensor:
        return F.silu(self.branch(maps) + self.shortcut(maps))


class _SqueezeExcite(nn.Module):
    """Scales each channel by what the means of all channels say."""

    def __init__(self, dim: int, squeezed_dim: int) -> None:
        super().__init__()
        self.gate = nn.Sequential(nn.Linear(dim, squeezed_dim), nn.SiLU(), nn.Linear(squeezed_dim, dim), nn.Sigmoid())

    def forward(self, maps: Tensor) -> Tensor:
        scale: Tensor = self.gate(maps.mean((2, 3)))
        return maps * scale[..., None, None]


class _ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of each place, (N, C, h, w)."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.movedim(1, -1)).movedim(-1, 1)
