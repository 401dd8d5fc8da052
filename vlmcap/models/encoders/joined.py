"""Two encoders whose features are joined: resampled to the grid of the first, and concatenated along channels.

Legend: B batch, F frames, T steps in time (frames, or joined frames of a video encoder), P patches per step on a grid
h × w, Dv vision width, S side of a frame in pixels; 1 and 2 stand for the encoders.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from vlmcap.models.encoders.base import VisionEncoder
from vlmcap.models.encoders.preprocessing import FrameTransform
from vlmcap.models.projectors.base import Grid
from vlmcap.models.projectors.reducers import resize_grid
from vlmcap.types import GridTHW


@dataclass(frozen=True, slots=True)
class JoinedTransform:
    """Resizes each frame for both encoders; picklable for the data workers.

    Attributes:
        first: Transform of the first encoder.
        second: Transform of the second encoder.
        frames_per_token: Frames of which a clip has a multiple; the last one is repeated.
    """

    first: FrameTransform
    second: FrameTransform
    frames_per_token: int = 1

    @property
    def frame_bytes(self) -> int:
        """Bytes of a frame for both encoders."""
        return 3 * (self.first.image_size**2 + self.second.image_size**2)

    def __call__(self, frames: Tensor) -> Tensor:
        """Resizes frames, uint8 (F, 3, H, W) -> uint8 (F, 3 · S1² + 3 · S2²)."""
        missing = -len(frames) % self.frames_per_token
        frames = torch.cat([frames, frames[-1:].expand(missing, -1, -1, -1)])
        # Both sizes in one tensor: (F, 3 · S1²) and (F, 3 · S2²) -> (F, 3 · S1² + 3 · S2²)
        return torch.cat([self.first(frames).flatten(1), self.second(frames).flatten(1)], dim=1)

    def split(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the frames of each encoder, (B, F, 3 · S1² + 3 · S2²) -> (B, F, 3, S1, S1), (B, F, 3, S2, S2)."""
        sides = self.first.image_size, self.second.image_size
        first, second = frames.split([3 * side**2 for side in sides], dim=-1)
        return first.unflatten(-1, (3, sides[0], sides[0])), second.unflatten(-1, (3, sides[1], sides[1]))

    def grid_thw(self, num_frames: int, height: int, width: int) -> GridTHW | None:
        """Returns the size of a clip for the first encoder."""
        return self.first.grid_thw(num_frames, height, width)


class JoinedEncoder(nn.Module):
    """Two encoders with the interface of `VisionEncoder`.

    Args:
        first: Encoder whose grid and steps in time the features have.
        second: Encoder whose features follow those of the first along the width.
    """

    max_tiles = 1
    num_prefix_tokens = 0

    def __init__(self, first: VisionEncoder, second: VisionEncoder) -> None:
        super().__init__()
        self.encoders = nn.ModuleList([first, second])
        self.frames_per_token, self.grid, self.feature_layer = first.frames_per_token, first.grid, first.feature_layer
        self.embed_dim = first.embed_dim + second.embed_dim
        self.grids = first.grid, second.grid
        joined = max(first.frames_per_token, second.frames_per_token)
        self.transform = JoinedTransform(cast(Any, first.transform), cast(Any, second.transform), joined)

    @property
    def num_patches(self) -> int:
        """P of the first encoder."""
        return math.prod(self.grid)

    def possible_grids(self, num_frames: int) -> Sequence[GridTHW]:
        """Returns the possible sizes of a clip for the first encoder.

        Raises:
            UserError: One of the encoders does not support this number of frames.
        """
        # Both are asked, as either may refuse the number of frames.
        first, _ = (cast(VisionEncoder, encoder).possible_grids(num_frames) for encoder in self.encoders)
        return first

    def forward(self, frames: Tensor, grid_thw: Sequence[GridTHW] | None = None) -> Tensor:
        """Encodes clips to patch features, uint8 (B, F, 3 · S1² + 3 · S2²) -> (B, T1, P1, Dv1 + Dv2).

        Args:
            frames: Frames as returned by `transform`, padded at the end of F if clips have fewer.
            grid_thw: Size of each clip for the first encoder, if sizes are stated.
        """
        first, second = self.encoders
        first_frames, second_frames = self.transform.split(frames)
        grids = None
        if grid_thw is not None:
            per_step = cast(VisionEncoder, second).frames_per_token
            steps = [math.ceil(count * self.frames_per_token / per_step) for count, _, _ in grid_thw]
            grids = [(count, *self.grids[1]) for count in steps]
        return join_features(first(first_frames, grid_thw), second(second_frames, grids), self.grids)


def join_features(first: Tensor, second: Tensor, grids: tuple[Grid, Grid]) -> Tensor:
    """Concatenates features along channels, (…, T1, P1, Dv1) and (…, T2, P2, Dv2) -> (…, T1, P1, Dv1 + Dv2).

    In space, the second is resampled bilinearly. In time, its steps are repeated if it has fewer, or averaged if it has
    more.

    Args:
        first: Features whose steps, grid and dtype are kept.
        second: Features that are resampled.
        grids: Patch grids (h, w) of both.
    """
    steps, others = first.shape[-3], second.shape[-3]
    with torch.autocast("cpu" if first.is_meta else first.device.type, enabled=False):
        moved = resize_grid(second.float(), grids[1], grids[0])  # (…, T2, P2, Dv2) -> (…, T2, P1, Dv2)
        # The second encoder has fewer steps in time: each of them is repeated.
        if others < steps:
            moved = moved.repeat_interleave(math.ceil(steps / others), dim=-3).narrow(-3, 0, steps)
        # It has more steps: neighbours are averaged, after the last one has filled up the last group.
        elif others > steps:
            size = math.ceil(others / steps)
            last = moved.narrow(-3, others - 1, 1).repeat_interleave(steps * size - others, dim=-3)
            moved = torch.cat([moved, last], dim=-3).unflatten(-3, (steps, size)).mean(-3)
        return torch.cat([first, moved.to(first.dtype)], dim=-1)
