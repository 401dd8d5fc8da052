"""All maps from vision to language width, each with the interface of `Projection`: tokens and their layout in, tokens out.

Token by token (`MLPProjector`, `PixelShuffleProjector`), by attention of queries (`QueryProjector` for each frame, `PromptProjector` and
`PerceiverProjector` for the clip), or by convolutions (`CAbstractorProjector`).

Legend: B batch, F frames, M = B · F, P tokens a frame (row-major over a grid h × w), D width of what comes in, C inner width, Q queries,
N tokens of the question, Dl language width.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmcap.models.projectors.base import CrossAttention, FeedForward, Projection, TokenLayout, cast_once
from vlmcap.models.projectors.reducers import pool_maps, resize_grid


class MLPProjector(Projection):
    """`depth` linear layers with GELU between them, the same for every token; depth 2 is LLaVA-1.5's projector.

    Source: Liu et al., "Improved Baselines with Visual Instruction Tuning", https://arxiv.org/abs/2310.03744.

    Args:
        in_dim: D.
        out_dim: Dl.
        depth: Number of linear layers, at least 1; 1 is a linear projector.
        use_layer_norm: LayerNorm in front, which gives the features of any encoder a common scale.
    """

    def __init__(self, in_dim: int, out_dim: int, depth: int = 2, *, use_layer_norm: bool = False) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Linear(in_dim, out_dim)]
        for _ in range(depth - 1):
            layers += [nn.GELU(), nn.Linear(out_dim, out_dim)]
        self.norm = nn.LayerNorm(in_dim) if use_layer_norm else nn.Identity()
        self.layers = nn.Sequential(*layers)

    def forward(self, tokens: Tensor, layout: TokenLayout) -> Tensor:
        """Projected tokens, (B, F, P, D) -> (B, F, P, Dl)."""
        projected: Tensor = self.layers(self.norm(tokens))
        return projected


class PixelShuffleProjector(MLPProjector):
    """InternVL's projector: joins s × s patches into a token of s² · D, then LayerNorm and an MLP.

    Order of tokens and of the channels in a token are InternVL's, so its weights fit.
    Source: Chen et al., "How Far Are We to GPT-4V?", https://arxiv.org/abs/2404.16821.

    Args:
        in_dim: D.
        out_dim: Dl.
        factor: s, a divisor of the grid.
        depth: Linear layers; InternVL has two.
    """

    def __init__(self, in_dim: int, out_dim: int, factor: int = 2, depth: int = 2) -> None:
        super().__init__(in_dim * factor**2, out_dim, depth, use_layer_norm=True)
        self.factor = factor

    def forward(self, tokens: Tensor, layout: TokenLayout) -> Tensor:
        """Projected tokens, (B, F, P, D) -> (B, F, P / s², Dl)."""
        return super().forward(shuffle_patches(tokens, layout.grid, self.factor), layout)


def shuffle_patches(tokens: Tensor, grid: tuple[int, int], factor: int) -> Tensor:
    """Patches joined s × s, (B, F, P, D) -> (B, F, P / s², s² · D): rows inside a token first, then columns, then channels."""
    batch, frames, _, width = tokens.shape
    rows, columns = grid[0] // factor, grid[1] // factor
    cells = tokens.reshape(batch, frames, rows, factor, columns, factor, width).transpose(3, 4)
    return cells.reshape(batch, frames, rows * columns, factor**2 * width)


class QueryProjector(Projection):
    """Learned queries attend to each frame on its own: Q tokens a frame whatever its size.

    A layer is pre-norm cross-attention and a feed-forward part, both with residual: the Q-Former of BLIP-2 (Li et al.,
    https://arxiv.org/abs/2301.12597) without its self-attention, or the resampler of Qwen-VL (Bai et al.,
    https://arxiv.org/abs/2308.12966) with more than one layer. All layers have the inner width and one last linear layer leads to Dl.

    Args:
        in_dim: D.
        out_dim: Dl.
        hidden_dim: C, a multiple of `num_heads`.
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
        hidden_dim: C, a multiple of `num_heads`.
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


class PerceiverProjector(Projection):
    """Flamingo's resampler: learned latents attend to the features of all frames and to themselves, Q tokens a clip.

    The frame embedding that tells frames apart is added in front of it (`NormalizedPosition`), where it survives a choice of tokens.
    Source: Alayrac et al., "Flamingo: a Visual Language Model for Few-Shot Learning", https://arxiv.org/abs/2204.14198.

    Args:
        in_dim: D.
        out_dim: Dl.
        hidden_dim: C, a multiple of `num_heads`.
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


class CAbstractorProjector(Projection):
    """Position, convolution blocks, pooling to a square, convolution blocks, then an MLP to Dl: neighbours stay neighbours.

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
    """RegNet's block with squeeze-and-excitation, (M, in, h, w) -> (M, out, h, w); the 3 × 3 convolution takes each channel alone."""

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
    """LayerNorm over the channels of each place, (M, C, h, w)."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.movedim(1, -1)).movedim(-1, 1)
