"""All projections from vision to language width, with their requirements and their number of tokens.

They map token by token (`MLPProjector`, `PixelShuffleProjector`), by attention from queries (`QueryProjector` per
frame, `PromptProjector` and `PerceiverProjector` per clip), or by convolutions (`CAbstractorProjector`).

Legend: B batch, F frames, M = B · F, P tokens per frame (row-major over a grid h × w), D input width, C inner width,
Q queries, N tokens of the question, Dl language width.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmcap.config import (
    CAbstractorConfig,
    CrossAttentionConfig,
    LinearConfig,
    MlpConfig,
    PerceiverConfig,
    PixelShuffleConfig,
    Queries,
    Reducer,
)
from vlmcap.config.kinds import register_component
from vlmcap.errors import UserError
from vlmcap.models.projectors.base import (
    CrossAttention,
    FeedForward,
    Grid,
    Projection,
    ProjectorSizes,
    TokenLayout,
    cast_for_autocast,
)
from vlmcap.models.projectors.reducers import pool_maps, reduced_grid, resize_grid


@register_component("projector", LinearConfig)
@register_component("projector", MlpConfig)
class MLPProjector(Projection[LinearConfig]):
    """An MLP of `depth` linear layers with GELU, applied to every token; depth 2 is LLaVA-1.5's projector.

    `projector=linear` has one layer. A LayerNorm before it gives the features of any encoder a common scale.
    Source: Liu et al., "Improved Baselines with Visual Instruction Tuning", https://arxiv.org/abs/2310.03744.
    """

    reads = "token"

    def __init__(self, config: LinearConfig, sizes: ProjectorSizes) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(sizes.in_dim) if config.use_layer_norm else nn.Identity()
        self.layers = _linear_layers(sizes.in_dim, sizes.out_dim, config.depth if isinstance(config, MlpConfig) else 1)

    def forward(self, tokens: Tensor, layout: TokenLayout) -> Tensor:
        """Projects each token, (B, F, P, D) -> (B, F, P, Dl)."""
        projected: Tensor = self.layers(self.norm(tokens))
        return projected


def _linear_layers(in_dim: int, out_dim: int, depth: int) -> nn.Sequential:
    later = (layer for _ in range(depth - 1) for layer in (nn.GELU(), nn.Linear(out_dim, out_dim)))
    return nn.Sequential(nn.Linear(in_dim, out_dim), *later)


@register_component("projector", PixelShuffleConfig)
class PixelShuffleProjector(Projection[PixelShuffleConfig]):
    """InternVL's projector: s × s patches form a token of width s² · D, followed by LayerNorm and an MLP.

    The order of tokens and of the channels in a token is that of InternVL, so its weights fit.
    Source: Chen et al., "How Far Are We to GPT-4V?", https://arxiv.org/abs/2404.16821.
    """

    def __init__(self, config: PixelShuffleConfig, sizes: ProjectorSizes) -> None:
        super().__init__()
        self.factor = config.shuffle
        in_dim = sizes.in_dim * config.shuffle**2
        self.norm, self.layers = nn.LayerNorm(in_dim), _linear_layers(in_dim, sizes.out_dim, config.depth)

    def forward(self, tokens: Tensor, layout: TokenLayout) -> Tensor:
        """Joins and projects patches, (B, F, P, D) -> (B, F, P / s², Dl)."""
        joined = shuffle_patches(tokens, layout.grid, self.factor)  # (B, F, P, D) -> (B, F, P / s², s² · D)
        projected: Tensor = self.layers(self.norm(joined))
        return projected

    @classmethod
    def validate(cls, config: PixelShuffleConfig, sizes: ProjectorSizes) -> None:
        """Raises a `UserError` unless s divides the grid; it names the nearest grid that s divides."""
        shuffle, grid = config.shuffle, sizes.grid
        if not any(side % shuffle for side in reduced_grid(config, grid)):
            return
        wrong = f"projector.shuffle={shuffle} does not divide the grid"
        if config.reducer is Reducer.resample:
            size = config.resample_size
            raise UserError(
                f"{wrong} of {size} × {size} patches; set projector.resample_size={_nearest(size, shuffle)}"
            )
        pool = config.pool_size if config.reducer is Reducer.pool else 1
        rows, columns = (_nearest(side, shuffle, pool) for side in grid)
        pooled = f", pooled {pool} × {pool}" if pool > 1 else ""
        raise UserError(
            f"{wrong} of {grid[0]} × {grid[1]} patches{pooled}; set encoder.image_size to the size of {rows} × "
            f"{columns} patches, or choose another projector"
        )

    @classmethod
    def out_grid(cls, config: PixelShuffleConfig, sizes: ProjectorSizes) -> Grid:
        """Returns the grid divided by s."""
        return sizes.grid[0] // config.shuffle, sizes.grid[1] // config.shuffle


def _nearest(side: int, factor: int, pool: int = 1) -> int:
    """Returns the side nearest to `side` that `factor` divides after pooling; the larger of two."""
    # a whole multiple lies within one step
    fitting = (n for n in range(1, side + 2 * factor * pool) if math.ceil(n / pool) % factor == 0)
    return min(fitting, key=lambda n: (abs(n - side), -n))


def shuffle_patches(tokens: Tensor, grid: Grid, factor: int) -> Tensor:
    """Joins s × s patches into one token, (B, F, P, D) -> (B, F, P / s², s² · D).

    Within a token, patch rows come first, then patch columns, then channels.
    """
    batch, frames, _, width = tokens.shape
    rows, columns = grid[0] // factor, grid[1] // factor
    # (B, F, P, D) -> (B, F, h / s, w / s, s, s, D)
    cells = tokens.reshape(batch, frames, rows, factor, columns, factor, width).transpose(3, 4)
    return cells.reshape(batch, frames, rows * columns, factor**2 * width)  # -> (B, F, P / s², s² · D)


@register_component("projector", CrossAttentionConfig)
class QueryProjector(Projection[CrossAttentionConfig]):
    """Learned queries that attend to each frame independently: Q tokens per frame, for frames of any size.

    A layer has pre-norm cross-attention and a feed-forward network, both with residual: the Q-Former of BLIP-2 (Li et
    al., https://arxiv.org/abs/2301.12597) without self-attention, or the resampler of Qwen-VL (Bai et al.,
    https://arxiv.org/abs/2308.12966) with several layers. All layers have the inner width, and a linear readout maps to
    Dl.
    """

    reads = "set"

    def __init__(self, config: CrossAttentionConfig, sizes: ProjectorSizes) -> None:
        super().__init__()
        in_dim, hidden_dim = sizes.in_dim, config.hidden_dim or sizes.in_dim
        self.queries = nn.Parameter(torch.randn(config.num_queries, hidden_dim) * 0.02)
        self.norm = nn.LayerNorm(in_dim)
        self.layers = nn.ModuleList(_QueryLayer(hidden_dim, in_dim, config.num_heads) for _ in range(config.num_layers))
        self.readout = nn.Sequential(nn.LayerNorm(hidden_dim), nn.Linear(hidden_dim, sizes.out_dim))

    def forward(self, tokens: Tensor, layout: TokenLayout) -> Tensor:
        """Returns the queries' outputs, (B, F, P, D) -> (B, F, Q, Dl)."""
        batch, frames, mask = tokens.shape[0], layout.num_frames, None
        if layout.frame_of is None:
            # Frames go to the batch dimension.
            features = self.norm(tokens.flatten(0, 1))  # (B, F, P, D) -> (M, P, D)
            queries = self.queries.expand(batch * frames, -1, -1)  # (Q, C) -> (M, Q, C), one copy per frame
        else:
            # Frames have different numbers of tokens: a mask restricts the queries to their frame.
            features = self.norm(tokens.flatten(1, 2))  # (B, 1, V, D) -> (B, V, D)
            queries = self.queries.repeat(frames, 1).expand(batch, -1, -1)  # (Q, C) -> (B, F · Q, C)
            own_frame = torch.arange(frames, device=tokens.device).repeat_interleave(len(self.queries))
            mask = (own_frame[:, None] == layout.frame_of[:, None, :]).unsqueeze(1)  # (B, 1, F · Q, V)
        features = cast_for_autocast(features)
        for layer in self.layers:
            queries = layer(queries, features, mask)
        projected: Tensor = self.readout(queries)
        return projected.reshape(batch, frames, len(self.queries), -1)  # (M, Q, Dl) or (B, F · Q, Dl) -> (B, F, Q, Dl)

    @classmethod
    def out_grid(cls, config: CrossAttentionConfig, sizes: ProjectorSizes) -> Grid | None:
        """Returns a grid of one row with the queries of a frame."""
        return 1, config.num_queries

    @classmethod
    def variant(cls, config: CrossAttentionConfig) -> type[Projection[CrossAttentionConfig]]:
        """Returns the class for learned queries, or for the question as queries."""
        return PromptProjector if config.queries is Queries.prompt else cls


class _QueryLayer(nn.Module):
    def __init__(self, dim: int, feature_dim: int, num_heads: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.attention = CrossAttention(dim, feature_dim, num_heads)
        self.feed_forward = FeedForward(dim)

    def forward(self, queries: Tensor, features: Tensor, mask: Tensor | None) -> Tensor:
        queries = queries + self.attention(self.norm(queries), features, mask)
        return queries + self.feed_forward(queries)


class PromptProjector(Projection[CrossAttentionConfig]):
    """The question's tokens as queries that attend to all features of the clip: N tokens per clip.

    A layer has post-norm cross-attention with residual, without a feed-forward network. In InstructBLIP (Dai et al.,
    https://arxiv.org/abs/2305.06500), the instruction selects features in a similar way.
    """

    reads = "set"
    chosen_by = "projector.queries=prompt"

    def __init__(self, config: CrossAttentionConfig, sizes: ProjectorSizes) -> None:
        super().__init__()
        hidden_dim = config.hidden_dim or sizes.in_dim
        self.embed = nn.Linear(sizes.out_dim, hidden_dim)
        self.layers = nn.ModuleList(
            _PromptLayer(hidden_dim, sizes.in_dim, config.num_heads) for _ in range(config.num_layers)
        )
        self.readout = nn.Linear(hidden_dim, sizes.out_dim)

    def forward(self, tokens: Tensor, layout: TokenLayout) -> Tensor:
        """Returns the question's outputs, (B, F, P, D) -> (B, N, Dl)."""
        assert layout.prompt is not None, "queries=prompt needs the embeddings of the question"
        features = cast_for_autocast(tokens.flatten(1, 2))  # (B, F, P, D) -> (B, F · P, D)
        words: Tensor = self.embed(layout.prompt.float()).expand(len(tokens), -1, -1)  # (N, Dl) -> (B, N, C)
        for layer in self.layers:
            words = layer(words, features)
        projected: Tensor = self.readout(words)
        return projected

    @classmethod
    def validate(cls, config: CrossAttentionConfig, sizes: ProjectorSizes) -> None:
        """Raises a `UserError` without a question."""
        if not sizes.num_prompt_tokens:
            raise UserError(
                "projector.queries=prompt needs a question, but llm.prompt is empty; set llm.prompt, or "
                "projector.queries=learned"
            )

    @classmethod
    def out_grid(cls, config: CrossAttentionConfig, sizes: ProjectorSizes) -> None:
        """Returns None, as the question's tokens belong to the whole clip."""

    @classmethod
    def num_tokens(cls, config: CrossAttentionConfig, sizes: ProjectorSizes) -> int:
        """Returns N."""
        assert sizes.num_prompt_tokens is not None
        return sizes.num_prompt_tokens


class _PromptLayer(nn.Module):
    def __init__(self, dim: int, feature_dim: int, num_heads: int) -> None:
        super().__init__()
        self.attention = CrossAttention(dim, feature_dim, num_heads)
        self.norm = nn.LayerNorm(dim)

    def forward(self, words: Tensor, features: Tensor) -> Tensor:
        attended: Tensor = self.norm(self.attention(words, features) + words)
        return attended


@register_component("projector", PerceiverConfig)
class PerceiverProjector(Projection[PerceiverConfig]):
    """Flamingo's resampler: learned latents attend to the features of all frames and to themselves, Q tokens per clip.

    The frame embedding is added before it (`NormalizedPosition`), and before a reducer selects tokens.
    Source: Alayrac et al., "Flamingo: a Visual Language Model for Few-Shot Learning", https://arxiv.org/abs/2204.14198.
    """

    reads = "set"
    embeds_frames = True

    def __init__(self, config: PerceiverConfig, sizes: ProjectorSizes) -> None:
        super().__init__()
        hidden_dim = config.hidden_dim or sizes.in_dim
        self.enter = nn.Linear(sizes.in_dim, hidden_dim)
        self.latents = nn.Parameter(torch.randn(config.num_queries, hidden_dim) * 0.02)
        self.layers = nn.ModuleList(_PerceiverLayer(hidden_dim, config.num_heads) for _ in range(config.num_layers))
        self.readout = nn.Sequential(nn.LayerNorm(hidden_dim), nn.Linear(hidden_dim, sizes.out_dim))

    def forward(self, tokens: Tensor, layout: TokenLayout) -> Tensor:
        """Returns the latents' outputs, (B, F, P, D) -> (B, Q, Dl)."""
        features = self.enter(tokens.flatten(1, 2))  # (B, F, P, D) -> (B, F · P, C)
        latents = self.latents.expand(len(tokens), -1, -1)  # (Q, C) -> (B, Q, C)
        for layer in self.layers:
            latents = layer(latents, features)
        projected: Tensor = self.readout(latents)
        return projected

    @classmethod
    def out_grid(cls, config: PerceiverConfig, sizes: ProjectorSizes) -> None:
        """Returns None, as the latents belong to the whole clip."""

    @classmethod
    def num_tokens(cls, config: PerceiverConfig, sizes: ProjectorSizes) -> int:
        """Returns Q."""
        return config.num_queries


class _PerceiverLayer(nn.Module):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.latent_norm, self.feature_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = CrossAttention(dim, dim, num_heads)
        self.feed_forward = FeedForward(dim)

    def forward(self, latents: Tensor, features: Tensor) -> Tensor:
        queries = self.latent_norm(latents)
        # (B, F · P, C), (B, Q, C) -> (B, F · P + Q, C): latents attend to the features and to each other
        latents = latents + self.attention(queries, torch.cat([self.feature_norm(features), queries], dim=1))
        return latents + self.feed_forward(latents)


@register_component("projector", CAbstractorConfig)
class CAbstractorProjector(Projection[CAbstractorConfig]):
    """Honeybee's C-Abstractor: position embedding, convolutions, pooling to a square, convolutions and an MLP to Dl.

    Convolutions and pooling keep the locality of the patches.
    Source: Cha et al., "Honeybee: Locality-enhanced Projector for Multimodal LLM", https://arxiv.org/abs/2312.06742.
    """

    def __init__(self, config: CAbstractorConfig, sizes: ProjectorSizes) -> None:
        super().__init__()
        in_dim, out_dim, hidden_dim = sizes.in_dim, sizes.out_dim, config.hidden_dim or sizes.in_dim
        self.grid, self.side = sizes.grid, math.isqrt(config.num_queries)
        self.position = nn.Parameter(torch.randn(1, math.prod(sizes.grid), in_dim) * 0.02)  # other grids interpolate it
        widths = [in_dim] + [hidden_dim] * config.num_layers
        self.before = nn.Sequential(*(_ConvBlock(*pair) for pair in pairwise(widths)))
        self.after = nn.Sequential(*(_ConvBlock(hidden_dim, hidden_dim) for _ in range(config.num_layers)))
        self.readout = nn.Sequential(nn.Linear(hidden_dim, out_dim), nn.SiLU(), nn.Linear(out_dim, out_dim))

    def forward(self, tokens: Tensor, layout: TokenLayout) -> Tensor:
        """Returns the tokens of the square, (B, F, P, D) -> (B, F, num_queries, Dl)."""
        tokens = tokens + resize_grid(self.position, self.grid, layout.grid)
        maps = tokens.flatten(0, 1).transpose(1, 2).unflatten(2, layout.grid)  # (B, F, P, D) -> (M, D, h, w)
        pooled = pool_maps(self.before(maps), self.side)  # -> (M, C, side, side)
        projected: Tensor = self.readout(self.after(pooled).flatten(2).transpose(1, 2))  # -> (M, side², Dl)
        return projected.unflatten(0, tokens.shape[:2])  # -> (B, F, side², Dl)

    @classmethod
    def validate(cls, config: CAbstractorConfig, sizes: ProjectorSizes) -> None:
        """Raises a `UserError` unless the tokens of a frame form a square."""
        if math.isqrt(config.num_queries) ** 2 != config.num_queries:
            raise UserError(
                f"projector.num_queries={config.num_queries} is not a square number, which projector=c_abstractor "
                f"needs; set it to {round(math.sqrt(config.num_queries)) ** 2}"
            )

    @classmethod
    def out_grid(cls, config: CAbstractorConfig, sizes: ProjectorSizes) -> Grid:
        """Returns the grid of the square."""
        return math.isqrt(config.num_queries), math.isqrt(config.num_queries)


class _ConvBlock(nn.Module):
    """RegNet block with depthwise convolution and squeeze-and-excitation, (M, in, h, w) -> (M, out, h, w)."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.Conv2d(in_dim, out_dim, 1, bias=False),
            _ChannelNorm(out_dim),
            nn.SiLU(),
            nn.Conv2d(out_dim, out_dim, 3, padding=1, groups=out_dim, bias=False),
            _ChannelNorm(out_dim),
            nn.SiLU(),
            _SqueezeExcite(out_dim, max(1, in_dim // 4)),  # RegNet's ratio of 1/4
            nn.Conv2d(out_dim, out_dim, 1, bias=False),
            _ChannelNorm(out_dim),
        )
        self.shortcut: nn.Module = nn.Identity()
        if in_dim != out_dim:
            self.shortcut = nn.Sequential(nn.Conv2d(in_dim, out_dim, 1, bias=False), _ChannelNorm(out_dim))

    def forward(self, maps: Tensor) -> Tensor:
        return F.silu(self.branch(maps) + self.shortcut(maps))


class _SqueezeExcite(nn.Module):
    """Scales each channel by a gate that depends on the means of all channels."""

    def __init__(self, dim: int, squeezed_dim: int) -> None:
        super().__init__()
        self.gate = nn.Sequential(nn.Linear(dim, squeezed_dim), nn.SiLU(), nn.Linear(squeezed_dim, dim), nn.Sigmoid())

    def forward(self, maps: Tensor) -> Tensor:
        scale: Tensor = self.gate(maps.mean((2, 3)))  # (M, C, h, w) -> (M, C)
        return maps * scale[..., None, None]


class _ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of each place, (M, C, h, w)."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.movedim(1, -1)).movedim(-1, 1)
