"""What projections share: their interface, attention, and arithmetic under autocast.

Legend: B batch, F frames or stacks of frames, P tokens a frame, V tokens a clip, D width, N tokens of the question, Dl
language width; of attention, Q queries, K keys, H heads, D inner width, Dk width of the features.
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
    """What the other parts of a model make of a projector.

    Attributes:
        in_dim: Dv.
        out_dim: Dl.
        grid: The encoder's own (h, w), or that of one clip.
        num_frames: The most frames of a clip, or those of one clip.
        num_prompt_tokens: N; None where there is no question.
    """

    in_dim: int
    out_dim: int
    grid: Grid
    num_frames: int
    num_prompt_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class TokenLayout:
    """What a projection may have to know beside the tokens (B, F, P, D).

    Attributes:
        grid: (h, w) on which a frame's tokens stood before some were chosen, row-major.
        num_frames: F.
        frame_of: int64 (B, V), the frame of each token, where frames keep different numbers: tokens are then (B, 1, V,
            D).
        prompt: (N, Dl), embeddings of the question.
    """

    grid: Grid
    num_frames: int
    frame_of: Tensor | None = None
    prompt: Tensor | None = None


class Projection(nn.Module, Generic[C]):
    """Map from vision to language width: what a kind of projector is, inside of what stands around every kind.

    A subclass is made of `(config, sizes)`, its configuration and the sizes of what reaches it: behind the reducer and
    stacks of frames, where the configuration has them, and with `hidden_dim` filled in.

    Attributes:
        reads: "token" if it maps each token alone, "grid" if it needs all patches of a frame in their places, "set" if
            it reads any number of tokens in any places. It decides which reducers may stand in front.
        chosen_by: The setting that chooses this class where its kind alone does not.
        embeds_frames: Whether a frame embedding stands in front without `temporal=position`.
    """

    reads: ClassVar[Literal["token", "grid", "set"]] = "grid"
    chosen_by: ClassVar[str | None] = None
    embeds_frames: ClassVar[bool] = False

    def forward(self, tokens: Tensor, layout: TokenLayout) -> Tensor:
        """Tokens of the language model, (B, F, P, D) -> (B, F, P', Dl), or (B, V, Dl) where none belongs to a frame."""
        raise NotImplementedError

    @classmethod
    def validate(cls, config: C, sizes: ProjectorSizes) -> None:
        """Checks that there can be such a projection for clips of a size.

        Args:
            config: Settings.
            sizes: Sizes of what the encoder gives, in front of any reducer.

        Raises:
            UserError: There cannot.
        """

    @classmethod
    def out_grid(cls, config: C, sizes: ProjectorSizes) -> Grid | None:
        """Places of a frame's tokens in a clip of these sizes; None where tokens belong to no frame."""
        return sizes.grid

    @classmethod
    def num_tokens(cls, config: C, sizes: ProjectorSizes) -> int:
        """V of a clip of these sizes; to be stated where `out_grid` is None."""
        grid = cls.out_grid(config, sizes)
        assert grid is not None, f"{cls.__name__} has to state its number of tokens"
        return sizes.num_frames * math.prod(grid)

    @classmethod
    def variant(cls, config: C) -> type[Projection[Any]]:
        """The class for these settings, where a kind has more than one."""
        return cls


def projection_class(config: ProjectorConfig) -> type[Projection[Any]]:
    """The class that a configuration asks for."""
    kind: type[Projection[Any]] = maker_of("projector", config.kind)
    return kind.variant(config)


class CrossAttention(nn.Module):
    """Multi-head attention of queries to features.

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
        """What the queries found, (B, Q, D) and (B, K, Dk) -> (B, Q, D).

        `mask` is bool (B, 1, Q, K), True where to look.
        """
        query = split_heads(self.query(queries), self.num_heads)
        key, value = (split_heads(part, self.num_heads) for part in self.key_value(features).chunk(2, dim=-1))
        attended: Tensor = self.out(join_heads(F.scaled_dot_product_attention(query, key, value, attn_mask=mask)))
        return attended


class FeedForward(nn.Sequential):
    """LayerNorm and two linear layers with GELU, four times as wide inside; without the residual.

    Args:
        dim: Width of what comes in and goes out.
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
    """The features as autocast would cast them, once for all layers that read them.

    It keeps a copy a layer for the way back.
    """
    device = autocast_device(features)
    return features.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else features


def autocast_without_float16(features: Tensor) -> AbstractContextManager[object]:
    """Autocast as it is around the projector, but none where it would be float16, whose largest number is 65 504.

    Args:
        features: Tell the device.
    """
    device = autocast_device(features)
    is_enabled = torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=is_enabled and torch.get_autocast_dtype(device) is not torch.float16)


def autocast_device(features: Tensor) -> str:
    """Type of the features' device; autocast does not know the meta device."""
    return "cpu" if features.is_meta else features.device.type
