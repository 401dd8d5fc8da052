"""Frames of any size, cut into the patches that Qwen's vision towers take.

Legend: F frames, T temporal patches (F / 2), P patches a frame, h/w patch rows and columns, p side of a patch, H/W pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vlmcap.errors import UserError
from vlmcap.models.encoders.transforms import resize
from vlmcap.types import GridTHW

_MIN_BLOCKS = 4  # smaller frames are enlarged to as many merged patches


def smart_size(height: int, width: int, factor: int, max_blocks: int) -> tuple[int, int]:
    """Rows and columns of blocks of `factor` pixels that a frame is resized to, keeping its aspect ratio within the budget.

    The rule of Qwen's own processors (https://arxiv.org/abs/2409.12191), for a frame at a time. It lets very long frames exceed the
    budget; here they are squeezed into it.

    Args:
        height: Of the frame in pixels.
        width: Of the frame in pixels.
        factor: Side of a block in pixels.
        max_blocks: Most blocks a frame.
    """
    if min(height, width) < factor:
        scale = max(factor / height, factor / width)
        height, width = int(height * scale), int(width * scale)
    rows, columns = round(height / factor), round(width / factor)
    min_blocks = min(_MIN_BLOCKS, max_blocks)
    if rows * columns > max_blocks:
        beta = math.sqrt(height * width / (max_blocks * factor**2))
        rows, columns = max(1, math.floor(height / beta / factor)), max(1, math.floor(width / beta / factor))
    elif rows * columns < min_blocks:
        beta = math.sqrt(min_blocks * factor**2 / (height * width))
        rows, columns = math.ceil(height * beta / factor), math.ceil(width * beta / factor)
    return min(rows, max_blocks // min(columns, max_blocks)), min(columns, max_blocks)


@dataclass(frozen=True, slots=True)
class ClipTransform:
    """Resizes a clip within a budget of patches and cuts it up, in uint8; picklable, so that it runs in the data workers.

    Attributes:
        patch_size: p.
        temporal_patch_size: Frames that share a patch.
        merge_size: Patches a side that the merger joins; rows and columns are multiples of it.
        max_patches: P at most.
        resampling: "bicubic" or "bilinear", antialiased.
    """

    patch_size: int
    temporal_patch_size: int
    merge_size: int
    max_patches: int
    resampling: str = "bicubic"

    def grid_thw(self, num_frames: int, height: int, width: int) -> GridTHW:
        """(T, h, w) of a clip; the last frame of an uneven one is repeated."""
        rows, columns = smart_size(height, width, self.patch_size * self.merge_size, self.max_patches // self.merge_size**2)
        return math.ceil(num_frames / self.temporal_patch_size), rows * self.merge_size, columns * self.merge_size

    def possible_grids(self, num_frames: int) -> list[GridTHW]:
        """Every (T, h, w) that a clip of `num_frames` frames may get.

        Raises:
            UserError: The frames do not fill whole temporal patches.
        """
        steps, rest = divmod(num_frames, self.temporal_patch_size)
        if rest:
            size = self.temporal_patch_size
            raise UserError(
                f"this model looks at {size} frames at a time, so data.num_frames must be a multiple of {size}, not {num_frames}"
            )
        merge, blocks = self.merge_size, self.max_patches // self.merge_size**2
        least = min(_MIN_BLOCKS, blocks)
        sizes = [(rows, columns) for rows in range(1, blocks + 1) for columns in range(1, blocks // rows + 1) if rows * columns >= least]
        return [(steps, rows * merge, columns * merge) for rows, columns in sizes]

    def __call__(self, frames: Tensor) -> Tensor:
        """Patches in row-major order, uint8 (F, 3, H, W) -> uint8 (T, P, 3 · temporal_patch_size · p · p)."""
        size, span = self.patch_size, self.temporal_patch_size
        steps, rows, columns = self.grid_thw(frames.shape[0], *frames.shape[-2:])
        if missing := steps * span - len(frames):
            frames = torch.cat([frames, frames[-1:].expand(missing, -1, -1, -1)])
        cells = resize(frames, rows * size, columns * size, self.resampling).reshape(steps, span, 3, rows, size, columns, size)
        return cells.permute(0, 3, 5, 2, 1, 4, 6).reshape(steps, rows * columns, 3 * span * size * size)


def to_blocks(patches: Tensor, grid: tuple[int, int], merge_size: int) -> Tensor:
    """Row-major patches in the order in which they are merged, block after block, (…, h · w, D) -> (…, h · w, D)."""
    rows, columns = grid
    cells = patches.reshape(-1, rows // merge_size, merge_size, columns // merge_size, merge_size, patches.shape[-1])
    return cells.transpose(2, 3).reshape(patches.shape)


def from_blocks(patches: Tensor, grid: tuple[int, int], merge_size: int) -> Tensor:
    """The reverse of `to_blocks`, (…, h · w, D) -> (…, h · w, D)."""
    rows, columns = grid
    cells = patches.reshape(-1, rows // merge_size, columns // merge_size, merge_size, merge_size, patches.shape[-1])
    return cells.transpose(2, 3).reshape(patches.shape)
