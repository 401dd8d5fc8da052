"""Projectors whose queries look at the visual features: learned queries a frame, or the question.

Legend: B batch, F frames, P tokens a frame, V tokens of a clip, D width that comes in, h inner width, Q queries a frame, N tokens of the
question, Dl language width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vlmcap.models.projectors.attention import CrossAttention, FeedForward, cast_once
from vlmcap.models.projectors.base import Projection, TokenLayout


class QueryProjector(Projection):
    """Learned queries attend to each frame on its own: Q tokens a frame whatever its size.

    A layer is pre-norm cross-attention and a feed-forward part, both with residual: the Q-Former of BLIP-2 (Li et al.,
    https://arxiv.org/abs/2301.12597) without its self-attention, or the resampler of Qwen-VL (Bai et al.,
    https://arxiv.org/abs/2308.12966) with more than one layer. All layers have the inner width and one last linear layer leads to Dl.

    Args:
        in_dim: D.
        out_dim: Dl.
        hidden_dim: h, a multiple of `num_heads`.
        num_layers: Cross-attention layers.
        num_heads: Attention heads.
        num_queries: Q.
    """

    def __init__(self, in_dim: int, out_dim: int, *, hidden_dim: int, num_layers: int, num_heads: int, num_queries: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(num_queries, hidden_dim) * 0.02)
        self.norm = nn.LayerNorm(in_dim)
        self.layers = nn.ModuleList(_QueryLayer(hidden_dim, in_dim, num_heads) for _ in range(num_layers))
        self.readout = nn.Sequential(nn.LayerNorm(hidden_dim), nn.Linear(hidden_dim, out_dim))

    def forward(self, tokens: Tensor, layout: TokenLayout) -> Tensor:
        """Tokens of the queries, (B, F, P, D) -> (B, F, Q, Dl)."""
        batch, frames, mask = tokens.shape[0], layout.num_frames, None
        if layout.frame_of is None:
            features, queries = self.norm(tokens.flatten(0, 1)), self.queries.expand(batch * frames, -1, -1)
        else:
            features, queries = self.norm(tokens.flatten(1, 2)), self.queries.repeat(frames, 1).expand(batch, -1, -1)
            own_frame = torch.arange(frames, device=tokens.device).repeat_interleave(len(self.queries))
            mask = (own_frame[:, None] == layout.frame_of[:, None, :]).unsqueeze(1)
        features = cast_once(features)
        for layer in self.layers:
            queries = layer(queries, features, mask)
        projected: Tensor = self.readout(queries)
        return projected.reshape(batch, frames, len(self.queries), -1)


class _QueryLayer(nn.Module):
    def __init__(self, dim: int, feature_dim: int, num_heads: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.attention = CrossAttention(dim, feature_dim, num_heads)
        self.feed_forward = FeedForward(dim)

    def forward(self, queries: Tensor, features: Tensor, mask: Tensor | None) -> Tensor:
        queries = queries + self.attention(self.norm(queries), features, mask)
        return queries + self.feed_forward(queries)


class PromptProjector(Projection):
    """The question's tokens attend to all features of the clip: N tokens a clip, each a word with what the video shows of it.

    A layer is attention, residual and LayerNorm behind them, without a feed-forward part. InstructBLIP (Dai et al.,
    https://arxiv.org/abs/2305.06500) lets the instruction choose features in a similar way.

    Args:
        in_dim: D.
        out_dim: Dl, also the width of the question's embeddings.
        hidden_dim: h, a multiple of `num_heads`.
        num_layers: Cross-attention layers.
        num_heads: Attention heads.
    """

    def __init__(self, in_dim: int, out_dim: int, *, hidden_dim: int, num_layers: int, num_heads: int) -> None:
        super().__init__()
        self.embed = nn.Linear(out_dim, hidden_dim)
        self.layers = nn.ModuleList(_PromptLayer(hidden_dim, in_dim, num_heads) for _ in range(num_layers))
        self.readout = nn.Linear(hidden_dim, out_dim)

    def forward(self, tokens: Tensor, layout: TokenLayout) -> Tensor:
        """Tokens of the question, (B, F, P, D) -> (B, 1, N, Dl)."""
        assert layout.prompt is not None, "queries=prompt needs the embeddings of the question"
        features = cast_once(tokens.flatten(1, 2))
        words: Tensor = self.embed(layout.prompt.float()).expand(len(tokens), -1, -1)
        for layer in self.layers:
            words = layer(words, features)
        projected: Tensor = self.readout(words)
        return projected.unsqueeze(1)


class _PromptLayer(nn.Module):
    def __init__(self, dim: int, feature_dim: int, num_heads: int) -> None:
        super().__init__()
        self.attention = CrossAttention(dim, feature_dim, num_heads)
        self.norm = nn.LayerNorm(dim)

    def forward(self, words: Tensor, features: Tensor) -> Tensor:
        attended: Tensor = self.norm(self.attention(words, features) + words)
        return attended
