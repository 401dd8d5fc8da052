"""All maps from vision to language width: each says what it needs, how many tokens it gives, and how.

Token by token (`MLPProjector`, `PixelShuffleProjector`), by attention of queries (`QueryProjector` for each frame,
`PromptProjector` and `PerceiverProjector` for the clip), or by convolutions (`CAbstractorProjector`).

Legend: B batch, F frames, M = B · F, P tokens a frame (row-major over a grid h × w), D width of what comes in, C inner
width, Q queries, N tokens of the question, Dl language width.
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
    """`depth` linear layers with GELU between them, the same for every token; depth 2 is LLaVA-1.5's projector.

    One layer is `projector=linear`. A LayerNorm in front gives the features of any encoder a common scale.
    Source: Liu et al., "Improved Baselines with Visual Instruction Tuning", https://arxiv.org/abs/2310.03744.
    """

    reads = "token"

    def __init__(self, config: LinearConfig, sizes: ProjectorSizes) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(sizes.in_dim) if config.use_layer_norm else nn.Identity()
        self.layers = _linear_layers(sizes.in_dim, sizes.out_dim, config.depth if isinstance(config, MlpConfig) else 1)

    def forward(self, tokens: Tensor, layout: TokenLayout) -> Tensor:
        """Projected tokens, (B, F, P, D) -> (B, F, P, Dl)."""
        projected: Tensor = self.layers(self.norm(tokens))
        return projected


def _linear_layers(in_dim: int, out_dim: int, depth: int) -> nn.Sequential:
    """`depth` linear layers with GELU between them."""
    later = (layer for _ in range(depth - 1) for layer in (nn.GELU(), nn.Linear(out_dim, out_dim)))
    return nn.Sequential(nn.Linear(in_dim, out_dim), *later)


@register_component("projector", PixelShuffleConfig)
class PixelShuffleProjector(Projection[PixelShuffleConfig]):
    """InternVL's projector: joins s × s patches into a token of s² · D, then LayerNorm and an MLP.

    Order of tokens and of the channels in a token are InternVL's, so its weights fit.
    Source: Chen et al., "How Far Are We to GPT-4V?", https://arxiv.org/abs/2404.16821.
    """

    def __init__(self, config: PixelShuffleConfig, sizes: ProjectorSizes) -> None:
        super().__init__()
        self.factor = config.shuffle
        in_dim = sizes.in_dim * config.shuffle**2
        self.norm, self.layers = nn.LayerNorm(in_dim), _linear_layers(in_dim, sizes.out_dim, config.depth)

    def forward(self, tokens: Tensor, layout: TokenLayout) -> Tensor:
        """Projected tokens, (B, F, P, D) -> (B, F, P / s², Dl)."""
        projected: Tensor = self.layers(self.norm(shuffle_patches(tokens, layout.grid, self.factor)))
        return projected

    @classmethod
    def validate(cls, config: PixelShuffleConfig, sizes: ProjectorSizes) -> None:
        """Raises a `UserError` unless s divides the grid, with the nearest grid that it divides."""
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
        behind = f", pooled {pool} × {pool}" if pool > 1 else ""
        raise UserError(
            f"{wrong} of {grid[0]} × {grid[1]} patches{behind}; set encoder.image_size to the size of {rows} × "
            f"{columns} patches, "
            "or choose another projector"
        )

    @classmethod
    def out_grid(cls, config: PixelShuffleConfig, sizes: ProjectorSizes) -> Grid:
        """The grid divided by s."""
        return sizes.grid[0] // config.shuffle, sizes.grid[1] // config.shuffle


def _nearest(side: int, factor: int, pool: int = 1) -> int:
    """The side nearest to `side` that `factor` divides behind pooling; the larger of two."""
    fitting = (n for n in range(1, side + 2 * factor * pool) if math.ceil(n / pool) % factor == 0)
    return min(fitting, key=lambda n: (abs(n - side), -n))


def shuffle_patches(tokens: Tensor, grid: Grid, factor: int) -> Tensor:
    """Patches joined s × s, (B, F, P, D) -> (B, F, P / s², s² · D).

    Rows inside a token first, then columns, then channels.
    """
    batch, frames, _, width = tokens.shape
    rows, columns = grid[0] // factor, grid[1] // factor
    cells = tokens.reshape(batch, frames, rows, factor, columns, factor, width).transpose(3, 4)
    return cells.reshape(batch, frames, rows * columns, factor**2 * width)


@register_component("projector", CrossAttentionConfig)
class QueryProjector(Projection[CrossAttentionConfig]):
    """Learned queries attend to each frame on its own: Q tokens a frame whatever its size.

    A layer is pre-norm cross-attention and a feed-forward part, both with residual: the Q-Former of BLIP-2 (Li et al.,
    https://arxiv.org/abs/2301.12597) without its self-attention, or the resampler of Qwen-VL (Bai et al.,
    https://arxiv.org/abs/2308.12966) with more than one layer. All layers have the inner width and one last linear
    layer leads to Dl.
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
        """Tokens of the queries, (B, F, P, D) -> (B, F, Q, Dl)."""
        batch, frames, mask = tokens.shape[0], layout.num_frames, None
        if layout.frame_of is None:
            features, queries = self.norm(tokens.flatten(0, 1)), self.queries.expand(batch * frames, -1, -1)
        else:
            features, queries = self.norm(tokens.flatten(1, 2)), self.queries.repeat(frames, 1).expand(batch, -1, -1)
            own_frame = torch.arange(frames, device=tokens.device).repeat_interleave(len(self.queries))
            mask = (own_frame[:, None] == layout.frame_of[:, None, :]).unsqueeze(1)
        features = cast_for_autocast(features)
        for layer in self.layers:
            queries = layer(queries, features, mask)
        projected: Tensor = self.readout(queries)
        return projected.reshape(batch, frames, len(self.queries), -1)

    @classmethod
    def out_grid(cls, config: CrossAttentionConfig, sizes: ProjectorSizes) -> Grid | None:
        """The queries of a frame in a row."""
        return 1, config.num_queries

    @classmethod
    def variant(cls, config: CrossAttentionConfig) -> type[Projection[CrossAttentionConfig]]:
        """What attends: learned queries, or the question."""
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
    """The question's tokens attend to all features of the clip.

    N tokens a clip, each a word with what the video shows of it.

    A layer is attention, residual and LayerNorm behind them, without a feed-forward part. InstructBLIP (Dai et al.,
    https://arxiv.org/abs/2305.06500) lets the instruction choose features in a similar way.
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
        """Tokens of the question, (B, F, P, D) -> (B, N, Dl)."""
        assert layout.prompt is not None, "queries=prompt needs the embeddings of the question"
        features = cast_for_autocast(tokens.flatten(1, 2))
        words: Tensor = self.embed(layout.prompt.float()).expand(len(tokens), -1, -1)
        for layer in self.layers:
            words = layer(words, features)
        projected: Tensor = self.readout(words)
        return projected

    @classmethod
    def validate(cls, config: CrossAttentionConfig, sizes: ProjectorSizes) -> None:
        """Raises a `UserError` where there is no question."""
        if not sizes.num_prompt_tokens:
            raise UserError(
                "projector.queries=prompt needs a question, and there is none; set llm.prompt, or "
                "projector.queries=learned"
            )

    @classmethod
    def out_grid(cls, config: CrossAttentionConfig, sizes: ProjectorSizes) -> None:
        """The question's tokens belong to the whole clip."""

    @classmethod
    def num_tokens(cls, config: CrossAttentionConfig, sizes: ProjectorSizes) -> int:
        """N."""
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
    """Flamingo's resampler: learned latents attend to the features of all frames and to themselves, Q tokens a clip.

    The frame embedding that tells frames apart is added in front of it (`NormalizedPosition`), where it survives a
    choice of tokens.
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
        """Tokens of the latents, (B, F, P, D) -> (B, Q, Dl)."""
        features = self.enter(tokens.flatten(1, 2))
        latents = self.latents.expand(len(tokens), -1, -1)
        for layer in self.layers:
            latents = layer(latents, features)
        projected: Tensor = self.readout(latents)
        return projected

    @classmethod
    def out_grid(cls, config: PerceiverConfig, sizes: ProjectorSizes) -> None:
        """The latents belong to the whole clip."""

    @classmethod
    def num_tokens(cls, config: PerceiverConfig, sizes: ProjectorSizes) -> int:
        """Q."""
        return config.num_queries


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


@register_component("projector", CAbstractorConfig)
class CAbstractorProjector(Projection[CAbstractorConfig]):
    """Position, convolution blocks, pooling to a square, convolution blocks, then an MLP to Dl.

    Neighbours stay neighbours.

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
        """Tokens of the square, (B, F, P, D) -> (B, F, num_queries, Dl)."""
        tokens = tokens + resize_grid(self.position, self.grid, layout.grid)
        maps = tokens.flatten(0, 1).transpose(1, 2).unflatten(2, layout.grid)
        pooled = pool_maps(self.before(maps), self.side)
        projected: Tensor = self.readout(self.after(pooled).flatten(2).transpose(1, 2))
        return projected.unflatten(0, tokens.shape[:2])

    @classmethod
    def validate(cls, config: CAbstractorConfig, sizes: ProjectorSizes) -> None:
        """Raises a `UserError` unless the tokens of a frame make a square."""
        if math.isqrt(config.num_queries) ** 2 != config.num_queries:
            raise UserError(
                "projector=c_abstractor gives a square of tokens per frame, which "
                f"projector.num_queries={config.num_queries} is not; "
                f"set it to {round(math.sqrt(config.num_queries)) ** 2}"
            )

    @classmethod
    def out_grid(cls, config: CAbstractorConfig, sizes: ProjectorSizes) -> Grid:
        """The square."""
        return math.isqrt(config.num_queries), math.isqrt(config.num_queries)


class _ConvBlock(nn.Module):
    """RegNet's block with squeeze-and-excitation, (M, in, h, w) -> (M, out, h, w).

    The 3 × 3 convolution takes each channel alone.
    """

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
        self.shortcut = (
            nn.Identity()
            if is_same
            else nn.Sequential(nn.Conv2d(in_dim, out_dim, 1, bias=False), _ChannelNorm(out_dim))
        )

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
