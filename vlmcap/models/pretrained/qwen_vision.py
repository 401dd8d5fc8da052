"""From frames of any size to visual tokens, as Qwen-VL models do it.

Patches, the vision tower up to its mergers, the mergers.

Legend: B batch, F frames, T temporal patches (F / 2), P patches a frame (row-major over the grid h × w), p side of a
patch, H/W pixels, D width of the tower, n DeepStack layers of Qwen3-VL, Dv (1 + n) · D with them behind the last layer,
N merged patches of all clips, V visual tokens a clip, Dl language width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmcap.errors import UserError
from vlmcap.models.encoders.base import on_device
from vlmcap.models.encoders.preprocessing import Preprocessing, resize
from vlmcap.models.projectors.base import autocast_without_float16
from vlmcap.types import GridTHW

_MIN_BLOCKS = 4  # smaller frames are enlarged to as many merged patches


def smart_size(height: int, width: int, factor: int, max_blocks: int) -> tuple[int, int]:
    """Rows and columns of blocks of `factor` pixels that a frame is resized to, keeping its aspect ratio within the budget.

    The rule of Qwen's own processors (https://arxiv.org/abs/2409.12191), for a frame at a time. It lets very long
    frames exceed the budget; here they are squeezed into it.

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
    """Resizes a clip within a budget of patches and cuts it up, in uint8.

    Picklable, so that it runs in the data workers.

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
        rows, columns = smart_size(
            height, width, self.patch_size * self.merge_size, self.max_patches // self.merge_size**2
        )
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
                f"this model looks at {size} frames at a time, so data.num_frames must be a multiple of {size}, not "
                f"{num_frames}"
            )
        merge, blocks = self.merge_size, self.max_patches // self.merge_size**2
        least = min(_MIN_BLOCKS, blocks)
        sizes = [
            (rows, columns)
            for rows in range(1, blocks + 1)
            for columns in range(1, blocks // rows + 1)
            if rows * columns >= least
        ]
        return [(steps, rows * merge, columns * merge) for rows, columns in sizes]

    def __call__(self, frames: Tensor) -> Tensor:
        """Patches in row-major order, uint8 (F, 3, H, W) -> uint8 (T, P, 3 · temporal_patch_size · p · p)."""
        size, span = self.patch_size, self.temporal_patch_size
        steps, rows, columns = self.grid_thw(frames.shape[0], *frames.shape[-2:])
        if missing := steps * span - len(frames):
            frames = torch.cat([frames, frames[-1:].expand(missing, -1, -1, -1)])
        cells = resize(frames, rows * size, columns * size, self.resampling).reshape(
            steps, span, 3, rows, size, columns, size
        )
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


class _Unmerged(nn.Module):
    """Stands where a merger stood: hands out what the merger would have got, a row for each block of patches."""

    def __init__(self, block_size: int) -> None:
        super().__init__()
        self.block_size = block_size

    def forward(self, hidden: Tensor) -> Tensor:
        """(block_size · N, D) -> (N, block_size · D)."""
        return hidden.reshape(-1, self.block_size * hidden.shape[-1])


class QwenVisionEncoder(nn.Module):
    """The vision tower of a Qwen-VL model without its mergers, with the interface of `VisionEncoder`.

    Features are what the mergers take: those of the last block and, for Qwen3-VL, of its DeepStack layers
    (https://arxiv.org/abs/2406.04334) behind them, so that a cache holds all that training needs.

    Args:
        tower: Of transformers; its mergers are taken out.
        transform: What the data workers apply to frames.
        preprocessing: Mean and standard deviation, applied here, on the device.
    """

    mean: Tensor
    std: Tensor
    feature_layer = -1
    max_tiles = 1

    def __init__(self, tower: Any, *, transform: ClipTransform, preprocessing: Preprocessing) -> None:
        super().__init__()
        block_size = transform.merge_size**2
        tower.merger = _Unmerged(block_size)
        self.num_deep_layers = len(getattr(tower, "deepstack_merger_list", ()))
        if self.num_deep_layers:
            tower.deepstack_merger_list = nn.ModuleList([_Unmerged(block_size) for _ in range(self.num_deep_layers)])
        self.tower, self.transform = tower, transform
        self.embed_dim = (1 + self.num_deep_layers) * int(tower.patch_embed.embed_dim)
        self.register_buffer("mean", torch.tensor(preprocessing.mean).view(3, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(preprocessing.std).view(3, 1) * 255, persistent=False)

    @property
    def num_patches(self) -> int:
        """Largest P."""
        return self.transform.max_patches

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w) of a square frame that fills the budget."""
        side = math.isqrt(self.num_patches) // self.transform.merge_size * self.transform.merge_size
        return side, side

    def possible_grids(self, num_frames: int) -> Sequence[GridTHW]:
        """Every (T, h, w) that a clip of F frames may get."""
        return self.transform.possible_grids(num_frames)

    def forward(self, frames: Tensor, grid_thw: Sequence[GridTHW] | None = None) -> Tensor:
        """Patch features, uint8 (B, T, P, 3 · t · p · p) -> (B, T, P, Dv), zeros where a clip is smaller than the batch."""
        assert grid_thw is not None, "clips of this encoder have sizes of their own"
        merge, (num_steps, num_patches) = self.transform.merge_size, frames.shape[1:3]
        own = [
            to_blocks(clip[:steps, : h * w], (h, w), merge)
            for clip, (steps, h, w) in zip(frames, grid_thw, strict=True)
        ]
        flat = torch.cat([clip.flatten(0, 1) for clip in own])
        pixels = (flat.unflatten(-1, (3, -1)).to(self.mean.dtype) - self.mean) / self.std
        sizes = on_device(grid_thw, frames.device)
        output = self.tower(pixels.flatten(1).to(self.tower.patch_embed.proj.weight.dtype), grid_thw=sizes)
        layers = [output.pooler_output, *(output.deepstack_features if self.num_deep_layers else ())]
        blocks = torch.cat([layer.unflatten(-1, (merge**2, -1)) for layer in layers], dim=-1).flatten(
            0, 1
        )  # (4 · N, Dv)
        ends = [steps * h * w for steps, h, w in grid_thw]
        # Padded and stacked, not written into zeros: autograd refuses to write into a row of an iterated tensor.
        return torch.stack(
            [
                F.pad(
                    from_blocks(clip.reshape(steps, h * w, -1), (h, w), merge),
                    (0, 0, 0, num_patches - h * w, 0, num_steps - steps),
                )
                for clip, (steps, h, w) in zip(blocks.split(ends), grid_thw, strict=True)
            ]
        )


@dataclass(frozen=True, slots=True)
class MergerSpec:
    """Sizes of a model's patch mergers.

    Attributes:
        merge_size: Patches a side that become one token.
        grid: (h, w) of a square frame that fills the budget.
    """

    merge_size: int
    grid: tuple[int, int]

    def num_tokens(self, num_frames: int, grid: tuple[int, int] | None = None) -> int:
        """V of T temporal patches over h × w patches."""
        rows, columns = grid or self.grid
        return num_frames * rows * columns // self.merge_size**2


class MergerProjector(nn.Module):
    """2 × 2 patches to one token, by the checkpoint's own mergers.

    Weights stay in float32 and the input is cast at the edge; float16 autocast ends there too, as its largest number is
    65 504.

    Args:
        mergers: That of the last layer, then one for each DeepStack layer.
        spec: Sizes.
    """

    def __init__(self, mergers: Sequence[nn.Module], spec: MergerSpec) -> None:
        super().__init__()
        self.mergers = nn.ModuleList(mergers)
        self.spec = spec

    def num_tokens(self, num_frames: int, num_patches: int, grid: tuple[int, int] | None = None) -> int:
        """V for T temporal patches of P patches, without running."""
        return self.spec.num_tokens(num_frames, grid or (1, num_patches))

    def forward(self, features: Tensor, grid: tuple[int, int] | None = None, prompt: Tensor | None = None) -> Tensor:
        """Visual tokens, (B, T, P, Dv) -> float32 (B, V, (1 + n) · Dl).

        Those of the DeepStack layers stand behind the token's own.
        """
        assert grid is not None, "clips of this projector have sizes of their own"
        with autocast_without_float16(features):
            layers = to_blocks(features, grid, self.spec.merge_size).float().chunk(len(self.mergers), dim=-1)
            tokens = [
                merger(layer.flatten(0, 2).contiguous()) for merger, layer in zip(self.mergers, layers, strict=True)
            ]
        return torch.cat(tokens, dim=-1).float().unflatten(0, (len(features), -1))
