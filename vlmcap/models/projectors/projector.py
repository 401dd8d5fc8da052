"""The projector: a projection with reducer, frame stacking and temporal layers, its checks and its number of tokens.

Legend: B batch, F frames (tiles count), P patches per frame on a grid h × w, Dv vision width, V visual tokens per clip,
N tokens of the question, Dl language width.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor, nn

from vlmcap.config import ProjectorConfig, Reducer, Temporal, TokenProjectorConfig
from vlmcap.errors import UserError
from vlmcap.models.projectors import projections  # noqa: F401 - registers the kinds of this package
from vlmcap.models.projectors.base import (
    Grid,
    Projection,
    ProjectorSizes,
    TokenLayout,
    autocast_device,
    autocast_without_float16,
    projection_class,
)
from vlmcap.models.projectors.reducers import keep_salient, merge_tokens, num_chosen, reduced_grid, resize, stack_frames
from vlmcap.models.projectors.temporal import LocalGlobalAttention, NormalizedPosition, TemporalAttention


class Projector(nn.Module):
    """Maps the features of a clip to visual tokens in frame order.

    The steps are: reducer, frame stacking, position embedding, projection to Dl, and attention along time. A kind whose
    configuration is not a `TokenProjectorConfig` has the projection only.

    Weights stay in float32 and the input is cast to it, so that half-precision features cannot overflow here. Autocast
    is disabled for float16, whose largest number is 65 504.

    Args:
        config: Settings that `check_projector` has accepted.
        sizes: Sizes of encoder, language model and clips.
    """

    def __init__(self, config: ProjectorConfig, sizes: ProjectorSizes) -> None:
        super().__init__()
        self.config, self.sizes = config, sizes
        # The settings of the steps around the projection, and the sizes that these leave for it.
        self.around, inner = _around(config, sizes), _inner_sizes(config, sizes)
        if isinstance(config, TokenProjectorConfig):
            config = dataclasses.replace(config, hidden_dim=_inner_dim(config, sizes.in_dim))
        self.kind = projection_class(config)
        self.projection: Projection[Any] = self.kind(config, inner)
        self.before: NormalizedPosition | None = None
        # The perceiver needs the frame index, `temporal=position` the place in the frame as well.
        use_position = self.around.temporal is Temporal.position
        if use_position or self.kind.embeds_frames:
            self.before = NormalizedPosition(inner.in_dim, inner.num_frames, inner.grid if use_position else None)
        self.after = _temporal_attention(config, self.kind, inner)

    def num_tokens(self, num_frames: int, num_patches: int, grid: Grid | None = None) -> int:
        """Returns V for a clip of F frames with P patches on `grid`, without running; None is the encoder's grid."""
        assert num_patches == math.prod(grid or self.sizes.grid)
        return count_tokens(self.config, self.sizes, num_frames, grid)

    def forward(self, features: Tensor, grid: Grid | None = None, prompt: Tensor | None = None) -> Tensor:
        """Projects features to visual tokens, (B, F, P, Dv) -> float32 (B, V, Dl).

        Args:
            features: (B, F, P, Dv) of clips with one grid, without padding.
            grid: Patch grid (h, w); None is the encoder's grid.
            prompt: (N, Dl), embeddings of the question; only `queries=prompt` reads them.
        """
        grid = grid or self.sizes.grid
        assert features.shape[2] == math.prod(grid), f"{features.shape[2]} patches do not fill a grid of {grid}"
        # 1. Reduce, stack and place the features, always in float32.
        with torch.autocast(autocast_device(features), enabled=False):
            tokens, layout = self._prepare(features.float(), grid, prompt)  # (B, F, P, Dv) -> (B, F', P', D)
        with autocast_without_float16(features):
            # 2. Project.
            tokens = self.projection(tokens, layout)  # (B, F', P', D) -> (B, F', P'', Dl) or (B, V, Dl)
            if tokens.dim() == 3:
                tokens = tokens.unsqueeze(1)  # tokens of the whole clip: (B, V, Dl) -> (B, 1, V, Dl)
            # 3. Attend along time.
            if self.after is not None:
                # The grid after the projection, whose temporal attention interpolates its place embeddings.
                inner = dataclasses.replace(
                    _inner_sizes(self.config, self.sizes), grid=layout.grid, num_frames=layout.num_frames
                )
                tokens = self.after(tokens, self.kind.out_grid(self.config, inner) or layout.grid)
        return tokens.float().flatten(1, 2)  # (B, F', P'', Dl) -> (B, V, Dl)

    def _prepare(self, features: Tensor, grid: Grid, prompt: Tensor | None) -> tuple[Tensor, TokenLayout]:
        """Applies everything before the projection, and describes the resulting tokens."""
        around = self.around
        features, grid = resize(around, features, grid), reduced_grid(around, grid)  # (B, F, P, D) -> (B, F, P', D)
        features = stack_frames(features, around.frame_stack)  # (B, F, P', D) -> (B, F', P', stack · D)
        tokens, frame_of = features if self.before is None else self.before(features, grid), None
        if around.reducer is Reducer.merge:
            # `features` decide which tokens are alike; the tokens with their positions are averaged.
            tokens = merge_tokens(features, tokens, around.keep_ratio)
        elif around.reducer is Reducer.saliency:
            tokens, frame_of = keep_salient(features, tokens, grid, around.keep_ratio)
        return tokens, TokenLayout(grid, features.shape[1], frame_of, prompt)


def build_projector(config: ProjectorConfig, sizes: ProjectorSizes) -> Projector:
    """Builds the projector of a configuration with newly initialised weights.

    Raises:
        UserError: The settings exclude each other, or do not fit the sizes.
    """
    check_projector(config, sizes)
    return Projector(config, sizes)


def check_projector(config: ProjectorConfig, sizes: ProjectorSizes) -> None:
    """Checks the settings of a projector against each other and against the sizes.

    Raises:
        UserError: Two settings exclude each other, or one does not fit the sizes.
    """
    if isinstance(config, TokenProjectorConfig):
        _check_heads(config, sizes)
        _check_reducer(_around(config, sizes))
        _check_temporal(config, sizes)
    projection_class(config).validate(config, sizes)


def count_tokens(config: ProjectorConfig, sizes: ProjectorSizes, num_frames: int, grid: Grid | None = None) -> int:
    """Returns V, the number of visual tokens of a clip, without building the projector.

    Args:
        config: Settings of the projector.
        sizes: Sizes of encoder, language model and clips.
        num_frames: F of the clip.
        grid: Patch grid (h, w) of the clip; None is the encoder's grid.

    Raises:
        UserError: The projector does not support such a clip.
    """
    kind, around = projection_class(config), _around(config, sizes)
    sizes = dataclasses.replace(sizes, num_frames=num_frames, grid=grid or sizes.grid)
    kind.validate(config, sizes)
    inner = _inner_sizes(config, sizes)
    # A projection token by token keeps the number; the others give their own number whatever they read.
    if around.chooses_tokens and kind.reads == "token":
        return num_chosen(around.reducer, around.keep_ratio, inner.num_frames, math.prod(inner.grid))
    return kind.num_tokens(config, inner)


def _around(config: ProjectorConfig, sizes: ProjectorSizes) -> TokenProjectorConfig:
    """Returns the settings of the steps around the projection; defaults, which disable them, if there are none.

    A stack counts decoded frames in the settings, and what the encoder makes of them here.
    """
    if not isinstance(config, TokenProjectorConfig):
        return TokenProjectorConfig()
    # `frame_stack` counts decoded frames, of which the encoder has joined some already.
    return dataclasses.replace(config, frame_stack=math.ceil(config.frame_stack / sizes.frames_per_step))


def _inner_sizes(config: ProjectorConfig, sizes: ProjectorSizes) -> ProjectorSizes:
    """Returns the sizes after reducer and frame stacking; the last stack of a short clip is padded."""
    around = _around(config, sizes)
    stack = around.frame_stack
    return dataclasses.replace(
        sizes,
        in_dim=sizes.in_dim * stack,
        grid=reduced_grid(around, sizes.grid),
        num_frames=math.ceil(sizes.num_frames / stack),
    )


def _inner_dim(config: TokenProjectorConfig, in_dim: int) -> int:
    """Returns the width of attention and convolutions.

    It is `hidden_dim`, or else Dv rounded up to heads of even width, as rotary embeddings rotate pairs.
    """
    if config.hidden_dim is not None:
        return config.hidden_dim
    # Rotary embeddings need heads of even width.
    step = 2 * config.num_heads if config.has_heads else 1
    return math.ceil(in_dim / step) * step


def _temporal_attention(
    config: ProjectorConfig, kind: type[Projection[Any]], inner: ProjectorSizes
) -> nn.Module | None:
    if not isinstance(config, TokenProjectorConfig) or not config.attends:
        return None
    assert config.hidden_dim is not None, "filled in by the projector"
    width, hidden, heads = inner.out_dim, config.hidden_dim, config.num_heads
    if config.temporal is Temporal.local_global:
        return LocalGlobalAttention(
            width, hidden_dim=hidden, num_heads=heads, window=config.window, num_global=config.num_global
        )
    grid = kind.out_grid(config, inner)
    assert grid is not None, "refused by `check_projector`"
    return TemporalAttention(width, hidden_dim=hidden, num_heads=heads, max_frames=inner.num_frames, grid=grid)


def _check_heads(config: TokenProjectorConfig, sizes: ProjectorSizes) -> None:
    is_rotary = config.temporal is Temporal.local_global
    step, inner_dim = config.num_heads * (2 if is_rotary else 1), _inner_dim(config, sizes.in_dim)
    if not config.has_heads or inner_dim % step == 0:
        return
    wanted = (
        "twice projector.num_heads, as temporal=local_global needs heads of even width"
        if is_rotary
        else "projector.num_heads"
    )
    raise UserError(
        f"projector.hidden_dim={config.hidden_dim} is not a multiple of {wanted} ({step}); "
        f"set projector.hidden_dim={math.ceil(inner_dim / step) * step} or null"
    )


def _check_reducer(config: TokenProjectorConfig) -> None:
    if not config.chooses_tokens:
        return
    chosen = f"projector.reducer={config.reducer.name}"
    if config.frame_stack > 1:
        raise UserError(
            f"{chosen} keeps different places in each frame, so frames cannot be stacked after it; "
            "set projector.frame_stack=1, or projector.reducer=pool"
        )
    if projection_class(config).reads == "grid":
        raise UserError(
            f"projector={config.kind} needs the grid of patches, which {chosen} does not keep; "
            "set projector.reducer to none, pool or resample, or choose another projector"
        )
    if config.temporal is Temporal.attention:
        raise UserError(
            f"projector.temporal=attention follows one place through time, but {chosen} keeps different places "
            "in each frame; set projector.temporal to none, position or local_global"
        )


def _check_temporal(config: TokenProjectorConfig, sizes: ProjectorSizes) -> None:
    joined = sizes.frames_per_step
    if sizes.num_frames % math.ceil(config.frame_stack / joined):
        raise UserError(
            f"projector.frame_stack={config.frame_stack} does not divide data.num_frames={sizes.num_frames * joined}; "
            "set one to a divisor of the other"
        )
    if config.frame_stack % joined and config.frame_stack > 1:
        raise UserError(
            f"projector.frame_stack={config.frame_stack} splits the {joined} frames that the encoder joins; set it to "
            f"1 or to a multiple of {joined}"
        )
    kind = projection_class(config)
    if config.temporal is Temporal.attention and kind.out_grid(config, sizes) is None:
        chosen = kind.chosen_by or f"projector={config.kind}"
        raise UserError(
            f"projector.temporal=attention follows one place through time, but the tokens of {chosen} belong to the "
            "whole clip; set projector.temporal to none, position or local_global"
        )
