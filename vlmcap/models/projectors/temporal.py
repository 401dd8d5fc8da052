"""Temporal modelling: what tells the frames of a clip apart.

Legend: B batch, F frames, P tokens a frame, Dl language width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FramePosition(nn.Module):
    """Adds a learned embedding of the frame's index and of the token's place in the frame.

    Args:
        dim: Width of the tokens.
        max_frames: Frames, or stacks of frames, of a clip.
        num_positions: Tokens a frame.
        std: Of the embeddings at the start.
    """

    def __init__(self, dim: int, max_frames: int, num_positions: int, std: float = 0.02) -> None:
        super().__init__()
        self.frame = nn.Parameter(torch.randn(max_frames, 1, dim) * std)
        self.place = nn.Parameter(torch.randn(1, num_positions, dim) * std)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, F, P, D) -> (B, F, P, D)."""
        return tokens + self.frame[: tokens.shape[1]] + self.place


class NormalizedPosition(nn.Module):
    """LayerNorm, then `FramePosition`, in front of the projection: `temporal=position`.

    Standing in front, it lets the projector's own layers join what a token shows with where and when it does; from behind they could
    only be added, and left-and-early would look like right-and-late. The norm gives embeddings of any encoder a common scale.
    """

    def __init__(self, dim: int, max_frames: int, num_positions: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.position = FramePosition(dim, max_frames, num_positions, std=0.3)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, F, P, D) -> (B, F, P, D)."""
        placed: Tensor = self.position(self.norm(tokens))
        return placed


class TemporalAttention(nn.Module):
    """Self-attention along time for each patch position, with residual: divided space-time attention's temporal half.

    Source: Bertasius et al., "Is Space-Time Attention All You Need for Video Understanding?", https://arxiv.org/abs/2102.05095.

    Args:
        dim: Dl, a multiple of `num_heads`.
        num_heads: Attention heads.
        max_frames: Length of the learned frame embedding.
        num_positions: Tokens a frame.
    """

    def __init__(self, dim: int, num_heads: int, max_frames: int, num_positions: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.position = FramePosition(dim, max_frames, num_positions)
        self.norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, F, P, Dl) -> (B, F, P, Dl)."""
        batch, frames, places, dim = tokens.shape
        tokens = self.position(tokens)
        columns = self.norm(tokens).transpose(1, 2).reshape(batch * places, frames, dim)
        heads = self.qkv(columns).reshape(batch * places, frames, 3, self.num_heads, dim // self.num_heads)
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(batch * places, frames, dim)
        return tokens + self.out(mixed).reshape(batch, places, frames, dim).transpose(1, 2)
