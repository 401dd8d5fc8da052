"""Interface of projections, and the attention and autocast helpers that they share.

Legend: B batch, F frames or stacks of frames, P tokens per frame, V tokens per clip, D width, N tokens of the question,
Dl language width; for attention, Q queries, K keys, H heads, D inner width, Dk width of the features.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmcap.config import ProjectorConfig
from vlmcap.config.kinds import maker_of

Grid = tuple[int, int]
C = TypeVar("C", bound=ProjectorConfig)


@dataclass(frozen=True, slots=True)
class ProjectorSizes:
    """Sizes of a projector that encoder, language model and data determine.

    Attributes:
        in_dim: Dv.
        out_dim: Dl.
        grid: Patch grid (h, w) of the encoder, or of one clip.
        num_frames: Maximum frames of a clip, or frames of one clip; steps in time for an encoder that joins frames.
        num_prompt_tokens: N; None without a question.
        frames_per_step: Decoded frames that the encoder joins to one of these frames.
    """

    in_dim: int
    out_dim: int
    grid: Grid
    num_frames: int
    num_prompt_tokens: int | None = None
    frames_per_step: int = 1


@dataclass(frozen=True, slots=True)
class TokenLayout:
    """Where the tokens (B, F, P, D) of a projection come from.

    Attributes:
        grid: Row-major grid (h, w) of a frame's tokens, before a reducer selected or merged some of them.
        num_frames: F.
        frame_of: int64 (B, V), the frame of each token if frames keep different numbers of tokens, which are then
            (B, 1, V, D).
        prompt: (N, Dl), embeddings of the question.
    """

    grid: Grid
    num_frames: int
    frame_of: Tensor | None = None
    prompt: Tensor | None = None


class Projection(nn.Module, Generic[C]):
    """Base class of the map from vision to language width, the core of a `Projector`.

    A subclass is constructed from `(config, sizes)`: its configuration with `hidden_dim` filled in, and the sizes of
    its input, after the reducer and frame stacking if the configuration has them.

    Attributes:
        reads: "token" if it maps each token independently, "grid" if it needs all patches of a frame in place, "set" if
            it reads any number of tokens at any places. It decides which reducers may precede it.
        chosen_by: Setting that selects this class if `kind` alone does not.
        embeds_frames: Whether a frame embedding precedes it even without `temporal=position`.
    """

    reads: ClassVar[Literal["token", "grid", "set"]] = "grid"
    chosen_by: ClassVar[str | None] = None
    embeds_frames: ClassVar[bool] = False

    def forward(self, tokens: Tensor, layout: TokenLayout) -> Tensor:
        """Projects tokens, (B, F, P, D) -> (B, F, P', Dl), or (B, V, Dl) if they belong to the whole clip."""
        raise NotImplementedError

    @classmethod
    def validate(cls, config: C, sizes: ProjectorSizes) -> None:
        """Checks that the projection is possible for clips of these sizes.

        Args:
            config: Settings of the projector.
            sizes: Sizes of the encoder's output, before any reducer.

        Raises:
            UserError: The settings do not fit the sizes.
        """

    @classmethod
    def out_grid(cls, config: C, sizes: ProjectorSizes) -> Grid | None:
        """Returns the grid of a frame's output tokens; None if the tokens belong to the whole clip."""
        return sizes.grid

    @classmethod
    def num_tokens(cls, config: C, sizes: ProjectorSizes) -> int:
        """Returns V for a clip of these sizes; must be overridden if `out_grid` is None."""
        grid = cls.out_grid(config, sizes)
        assert grid is not None, f"{cls.__name__} must override num_tokens"
        return sizes.num_frames * math.prod(grid)

    @classmethod
    def variant(cls, config: C) -> type[Projection[Any]]:
        """Returns the class for these settings, for a kind with several classes."""
        return cls


def projection_class(config: ProjectorConfig) -> type[Projection[Any]]:
    """Returns the class that a configuration selects."""
    kind: type[Projection[Any]] = maker_of("projector", config.kind)
    return kind.variant(config)


class CrossAttention(nn.Module):
    """Multi-head cross-attention from queries to features.

    Args:
        dim: D, a multiple of `num_heads`.
        feature_dim: Dk.
        num_heads: H.
    """

    def __init__(self, dim: int, feature_dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(dim, dim)
        self.key_value = nn.Linear(feature_dim, 2 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, queries: Tensor, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attends, (B, Q, D) and (B, K, Dk) -> (B, Q, D).

        Args:
            queries: (B, Q, D).
            features: (B, K, Dk).
            mask: bool (B, 1, Q, K), True where a query may attend; None for everywhere.
        """
        query = split_heads(self.query(queries), self.num_heads)  # (B, Q, D) -> (B, H, Q, D / H)
        # (B, K, 2 · D) -> twice (B, K, D) -> twice (B, H, K, D / H)
        key, value = (split_heads(half, self.num_heads) for half in self.key_value(features).chunk(2, dim=-1))
        attended: Tensor = self.out(join_heads(F.scaled_dot_product_attention(query, key, value, attn_mask=mask)))
        return attended


class FeedForward(nn.Sequential):
    """LayerNorm and two linear layers with GELU and four times the width between them, without the residual.

    Args:
        dim: Input and output width.
    """

    def __init__(self, dim: int) -> None:
        super().__init__(nn.LayerNorm(dim), nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))


def split_heads(tokens: Tensor, num_heads: int) -> Tensor:
    """(B, Q, D) -> (B, H, Q, D / H)."""
    return tokens.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def join_heads(heads: Tensor) -> Tensor:
    """(B, H, Q, D / H) -> (B, Q, D)."""
    return heads.transpose(1, 2).flatten(2)


def cast_for_autocast(features: Tensor) -> Tensor:
    """Casts features to the autocast dtype for all layers that read them.

    Autocast itself would cast them in each layer and keep a copy per layer for the backward pass.
    """
    device = autocast_device(features)
    return features.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else features


def autocast_without_float16(features: Tensor) -> AbstractContextManager[object]:
    """Returns the surrounding autocast context, but a disabled one for float16, whose largest number is 65 504.

    Args:
        features: Tensor whose device is used.
    """
    device = autocast_device(features)
    is_enabled = torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=is_enabled and torch.get_autocast_dtype(device) is not torch.float16)


def autocast_device(features: Tensor) -> str:
    """Returns the device type for autocast, which does not support the meta device."""
    return "cpu" if features.is_meta else features.device.type
