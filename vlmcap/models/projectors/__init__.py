"""Projectors: features of the vision encoder to tokens of the language model.

Legend: B batch, F frames, P patches a frame, Dv vision width, V visual tokens a clip, Dl language width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vlmcap.models.projectors.mlp import MLPProjector
from vlmcap.models.projectors.reducers import FrameStack, PoolReducer
from vlmcap.models.projectors.temporal import NormalizedPosition, TemporalAttention


class Projector(nn.Module):
    """Reducers, embeddings of position, the map to Dl, attention along time, then all tokens of a clip in frame order.

    Weights stay in float32 and the input is cast at the edge, so that half precision in the encoder cannot overflow here; float16 autocast
    ends at the same edge, as its largest number is 65 504.

    Args:
        reducers: Run in order on (B, F, P, Dv).
        projection: (B, F, P, D) -> (B, F, P, Dl).
        before: (B, F, P, D) -> (B, F, P, D) in front of the projection, or None.
        after: (B, F, P, Dl) -> (B, F, P, Dl) behind it, or None.
    """

    def __init__(
        self,
        reducers: list[FrameStack | PoolReducer],
        projection: nn.Module,
        before: nn.Module | None = None,
        after: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.reducers = nn.ModuleList(reducers)
        self.projection, self.before, self.after = projection, before, after

    def num_tokens(self, num_frames: int, num_patches: int) -> int:
        """V for a clip of F frames with P patches, without running."""
        steps, places = _reduced(self.reducers, num_frames, num_patches)
        return steps * places

    def forward(self, features: Tensor) -> Tensor:
        """Visual tokens, (B, F, P, Dv) -> float32 (B, V, Dl)."""
        device = features.device.type
        is_narrow = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) is torch.float16
        with torch.autocast(device, enabled=torch.is_autocast_enabled(device) and not is_narrow):
            tokens = features.float()
            for reducer in self.reducers:
                tokens = reducer(tokens)
            if self.before is not None:
                tokens = self.before(tokens)
            tokens = self.projection(tokens)
            if self.after is not None:
                tokens = self.after(tokens)
        return tokens.float().flatten(1, 2)


def _reduced(reducers: nn.ModuleList | list[FrameStack | PoolReducer], num_frames: int, num_patches: int) -> tuple[int, int]:
    for reducer in reducers:
        num_frames, num_patches = reducer.num_tokens(num_frames, num_patches)  # type: ignore[operator]
    return num_frames, num_patches


def build_projector(
    kind: str,
    *,
    in_dim: int,
    out_dim: int,
    grid: tuple[int, int],
    num_frames: int,
    depth: int = 2,
    pool_size: int = 1,
    frame_stack: int = 1,
    temporal: str = "none",
    num_heads: int = 4,
) -> Projector:
    """The projector of a configuration.

    Args:
        kind: "linear" or "mlp".
        in_dim: Dv.
        out_dim: Dl.
        grid: (h, w) patches of a frame.
        num_frames: F, the most frames a clip may have.
        depth: Linear layers of the MLP.
        pool_size: Side of the average-pooling window in patches; 1 pools nothing.
        frame_stack: Consecutive frames joined in one token.
        temporal: "none", "position" or "attention".
        num_heads: Of the temporal attention.
    """
    reducers: list[FrameStack | PoolReducer] = []
    if pool_size > 1:
        reducers.append(PoolReducer(grid, pool_size))
    if frame_stack > 1:
        reducers.append(FrameStack(frame_stack))
    stacked_dim = in_dim * frame_stack
    steps, places = _reduced(reducers, num_frames, grid[0] * grid[1])
    return Projector(
        reducers,
        MLPProjector(stacked_dim, out_dim, depth=1 if kind == "linear" else depth),
        before=NormalizedPosition(stacked_dim, steps, places) if temporal == "position" else None,
        after=TemporalAttention(out_dim, num_heads, steps, places) if temporal == "attention" else None,
    )


__all__ = ["Projector", "build_projector"]
