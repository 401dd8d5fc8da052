"""One projector out of its parts.

Legend: B batch, F frames (tiles count), P patches a frame on a grid h × w, Dv vision width, V visual tokens a clip, N tokens of the
question, Dl language width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vlmcap.models.projectors.base import Projection, TokenLayout, autocast_device, wide_autocast
from vlmcap.models.projectors.projections import (
    CAbstractorProjector,
    MLPProjector,
    PerceiverProjector,
    PixelShuffleProjector,
    PromptProjector,
    QueryProjector,
)
from vlmcap.models.projectors.reducers import MergeReducer, PoolReducer, ResampleReducer, SaliencyReducer, stack_frames
from vlmcap.models.projectors.spec import Grid, ProjectorSpec
from vlmcap.models.projectors.temporal import LocalGlobalAttention, NormalizedPosition, TemporalAttention


class Projector(nn.Module):
    """Reducer, stacks of frames, position, the map to Dl, attention along time, then all tokens of a clip in frame order.

    Weights stay in float32 and the input is cast at the edge, so that half precision in the encoder cannot overflow here; float16 autocast
    ends at the same edge, as its largest number is 65 504.

    Args:
        spec: Checked settings and sizes.
    """

    def __init__(self, spec: ProjectorSpec) -> None:
        super().__init__()
        self.spec = spec
        self.resize, self.select = _resizing(spec), _selection(spec)
        self.projection = _projection(spec)
        self.before, self.after = _position(spec), _attention(spec)

    def num_tokens(self, num_frames: int, num_patches: int, grid: Grid | None = None) -> int:
        """V for a clip of F frames with P patches on `grid`, without running; None is the encoder's own grid."""
        rows, columns = grid or self.spec.grid
        assert num_patches == rows * columns
        return self.spec.num_tokens(num_frames, grid)

    def forward(self, features: Tensor, grid: Grid | None = None, prompt: Tensor | None = None) -> Tensor:
        """Visual tokens, (B, F, P, Dv) -> float32 (B, V, Dl).

        Args:
            features: Of clips with one grid, without padding.
            grid: Their (h, w); None is the encoder's own.
            prompt: (N, Dl), embeddings of the question; only queries=prompt looks at them.
        """
        grid = grid or self.spec.grid
        assert features.shape[2] == grid[0] * grid[1], f"{features.shape[2]} patches are no grid of {grid[0]} × {grid[1]}"
        with torch.autocast(autocast_device(features), enabled=False):
            tokens, layout = self._prepare(features.float(), grid, prompt)
        with wide_autocast(features):
            tokens = self.projection(tokens, layout)
            if self.after is not None:
                tokens = self.after(tokens, self.spec.out_grid(grid))
        return tokens.float().flatten(1, 2)

    def _prepare(self, features: Tensor, grid: Grid, prompt: Tensor | None) -> tuple[Tensor, TokenLayout]:
        """What the projection gets."""
        if self.resize is not None:
            features = self.resize(features, grid)
        grid, num_steps = self.spec.reduced_grid(grid), self.spec.num_steps(features.shape[1])
        features = stack_frames(features, self.spec.frame_stack)
        tokens = features if self.before is None else self.before(features, grid)
        frame_of = None
        if self.select is not None:
            tokens, frame_of = self.select(features, tokens, grid)
        return tokens, TokenLayout(grid, num_steps, frame_of, prompt)


def build_projector(spec: ProjectorSpec) -> Projector:
    """The projector of a specification, its weights fresh.

    Raises:
        UserError: There cannot be such a projector.
    """
    spec.check()
    return Projector(spec)


def _resizing(spec: ProjectorSpec) -> PoolReducer | ResampleReducer | None:
    if spec.reducer == "pool":
        return PoolReducer(spec.pool_size)
    return ResampleReducer(spec.resample_size) if spec.reducer == "resample" else None


def _selection(spec: ProjectorSpec) -> MergeReducer | SaliencyReducer | None:
    if not spec.chooses_tokens:
        return None
    return MergeReducer(spec.keep_ratio) if spec.reducer == "merge" else SaliencyReducer(spec.keep_ratio)


def _projection(spec: ProjectorSpec) -> Projection:
    widths, hidden = (spec.stacked_dim, spec.out_dim), spec.inner_dim
    if spec.kind == "pixel_shuffle":
        return PixelShuffleProjector(*widths, spec.shuffle, spec.depth)
    if spec.kind == "c_abstractor":
        grid = spec.reduced_grid(spec.grid)
        return CAbstractorProjector(*widths, grid=grid, hidden_dim=hidden, num_layers=spec.num_layers, num_queries=spec.num_queries)
    layers, heads, queries = spec.num_layers, spec.num_heads, spec.num_queries
    if spec.kind == "perceiver":
        return PerceiverProjector(*widths, hidden_dim=hidden, num_layers=layers, num_heads=heads, num_latents=queries)
    if spec.reads_clip:
        return PromptProjector(*widths, hidden_dim=hidden, num_layers=layers, num_heads=heads)
    if spec.kind == "cross_attention":
        return QueryProjector(*widths, hidden_dim=hidden, num_layers=layers, num_heads=heads, num_queries=queries)
    return MLPProjector(*widths, 1 if spec.kind == "linear" else spec.depth, use_layer_norm=spec.use_layer_norm)


def _position(spec: ProjectorSpec) -> NormalizedPosition | None:
    if spec.temporal != "position" and spec.kind != "perceiver":
        return None
    grid = spec.reduced_grid(spec.grid) if spec.temporal == "position" else None
    return NormalizedPosition(spec.stacked_dim, spec.num_steps(spec.num_frames), grid)


def _attention(spec: ProjectorSpec) -> TemporalAttention | LocalGlobalAttention | None:
    width, hidden, heads = spec.out_dim, spec.inner_dim, spec.num_heads
    if spec.temporal == "local_global":
        return LocalGlobalAttention(width, hidden_dim=hidden, num_heads=heads, window=spec.window, num_global=spec.num_global)
    if spec.temporal == "attention":
        steps, grid = spec.num_steps(spec.num_frames), spec.out_grid(spec.grid)
        return TemporalAttention(width, hidden_dim=hidden, num_heads=heads, max_frames=steps, grid=grid)
    return None
