"""Flamingo's resampler: a fixed number of latents reads a clip of any length.

Legend: B batch, F frames, P tokens a frame, D width that comes in, h inner width, Q latents a clip, Dl language width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vlmcap.models.projectors.attention import CrossAttention, FeedForward
from vlmcap.models.projectors.base import Projection, TokenLayout


class PerceiverProjector(Projection):
    """Learned latents attend to the features of all frames and to themselves: Q tokens a clip.

    The frame embedding that tells frames apart is added in front of it (`NormalizedPosition`), where it survives a choice of tokens.
    Source: Alayrac et al., "Flamingo: a Visual Language Model for Few-Shot Learning", https://arxiv.org/abs/2204.14198.

    Args:
        in_dim: D.
        out_dim: Dl.
        hidden_dim: h, a multiple of `num_heads`.
        num_layers: Layers of attention and feed-forward parts.
        num_heads: Attention heads.
        num_latents: Q.
    """

    def __init__(self, in_dim: int, out_dim: int, *, hidden_dim: int, num_layers: int, num_heads: int, num_latents: int) -> None:
        super().__init__()
        self.enter = nn.Linear(in_dim, hidden_dim)
        self.latents = nn.Parameter(torch.randn(num_latents, hidden_dim) * 0.02)
        self.layers = nn.ModuleList(_PerceiverLayer(hidden_dim, num_heads) for _ in range(num_layers))
        self.readout = nn.Sequential(nn.LayerNorm(hidden_dim), nn.Linear(hidden_dim, out_dim))

    def forward(self, tokens: Tensor, layout: TokenLayout) -> Tensor:
        """Tokens of the latents, (B, F, P, D) -> (B, 1, Q, Dl)."""
        features = self.enter(tokens.flatten(1, 2))
        latents = self.latents.expand(len(tokens), -1, -1)
        for layer in self.layers:
            latents = layer(latents, features)
        projected: Tensor = self.readout(latents)
        return projected.unsqueeze(1)


class _PerceiverLayer(nn.Module):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.latent_norm, self.feature_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = CrossAttention(dim, dim, num_heads)
        self.feed_forward = FeedForward(dim)

    def forward(self, latents: Tensor, features: Tensor) -> Tensor:
        queries = self.latent_norm(latents)
        latents = latents + self.attention(queries, torch.cat([self.feature_norm(features), queries], dim=1))
        return latents + self.feed_forward(latents)
