"""Vision components of Qwen-VL models: the transform of frames to patches, the vision tower, and the patch mergers.

Legend: B batch, F frames, T temporal patches (F / t), t frames per temporal patch, P patches per frame (row-major over
the grid h × w), p side of a patch, H/W pixels, D width of the tower, n DeepStack layers of Qwen3-VL, Dv = (1 + n) · D,
N merged patches of all clips, V visual tokens per clip, Dl language width.
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

_MIN_BLOCKS = 4  # merged patches to which smaller frames are enlarged


def smart_size(height: int, width: int, factor: int, max_blocks: int) -> tuple[int, int]:
    """Returns the size, in blocks of `factor` pixels, that a frame is resized to, keeping its aspect ratio.

    This is the rule of Qwen's own processors (https://arxiv.org/abs/2409.12191), applied per frame. They let very long
    frames exceed the budget; here such frames are squeezed into it.

    Args:
        height: Height of the frame in pixels.
        width: Width of the frame in pixels.
        factor: Side of a block in pixels.
        max_blocks: Maximum blocks per frame.

    Returns:
        Rows and columns of blocks.
    """
    # 1. A frame with a side of less than one block is enlarged until it has one.
    if min(height, width) < factor:
        scale = max(factor / height, factor / width)
        height, width = int(height * scale), int(width * scale)
    # 2. The nearest whole numbers of blocks.
    rows, columns = round(height / factor), round(width / factor)
    min_blocks = min(_MIN_BLOCKS, max_blocks)
    # 3. Too many blocks: both sides are divided by the same number, and rounded down.
    if rows * columns > max_blocks:
        beta = math.sqrt(height * width / (max_blocks * factor**2))
        rows, columns = max(1, math.floor(height / beta / factor)), max(1, math.floor(width / beta / factor))
    # 4. Too few: both are multiplied, and rounded up.
    elif rows * columns < min_blocks:
        beta = math.sqrt(min_blocks * factor**2 / (height * width))
        rows, columns = math.ceil(height * beta / factor), math.ceil(width * beta / factor)
    # 5. A long, narrow frame may still be over the budget, because each side has at least one block.
    return min(rows, max_blocks // min(columns, max_blocks)), min(columns, max_blocks)


@dataclass(frozen=True, slots=True)
class ClipTransform:
    """Resizes a clip within a budget of patches and splits it into patches, in uint8; picklable for the data workers.

    Attributes:
        patch_size: p.
        temporal_patch_size: t.
        merge_size: Patches per side that the merger joins; rows and columns are multiples of it.
        max_patches: Maximum P.
        resampling: "bicubic" or "bilinear", antialiased.
    """

    patch_size: int
    temporal_patch_size: int
    merge_size: int
    max_patches: int
    resampling: str = "bicubic"

    def grid_thw(self, num_frames: int, height: int, width: int) -> GridTHW:
        """Returns (T, h, w) of a clip; its last frame is repeated to fill the last temporal patch."""
        rows, columns = smart_size(
            height, width, self.patch_size * self.merge_size, self.max_patches // self.merge_size**2
        )
        return math.ceil(num_frames / self.temporal_patch_size), rows * self.merge_size, columns * self.merge_size

    def possible_grids(self, num_frames: int) -> list[GridTHW]:
        """Returns all possible (T, h, w) of a clip of `num_frames` frames.

        Raises:
            UserError: The frames do not fill complete temporal patches.
        """
        steps, rest = divmod(num_frames, self.temporal_patch_size)
        if rest:
            size = self.temporal_patch_size
            raise UserError(
                f"this model joins {size} frames to a temporal patch, so data.num_frames must be a multiple of {size}, "
                f"not {num_frames}"
            )
        # A block is the square of patches that becomes one token.
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
        """Splits a clip into row-major patches, uint8 (F, 3, H, W) -> uint8 (T, P, 3 · t · p · p)."""
        size, span = self.patch_size, self.temporal_patch_size
        steps, rows, columns = self.grid_thw(frames.shape[0], *frames.shape[-2:])
        if missing := steps * span - len(frames):
            frames = torch.cat([frames, frames[-1:].expand(missing, -1, -1, -1)])
        resized = resize(frames, rows * size, columns * size, self.resampling)
        cells = resized.reshape(steps, span, 3, rows, size, columns, size)  # (T, t, 3, h, p, w, p)
        # -> (T, h, w, 3, t, p, p) -> (T, P, 3 · t · p · p)
        return cells.permute(0, 3, 5, 2, 1, 4, 6).reshape(steps, rows * columns, 3 * span * size * size)


def to_blocks(patches: Tensor, grid: tuple[int, int], merge_size: int) -> Tensor:
    """Reorders row-major patches block after block, the order of merging, (…, h · w, D) -> (…, h · w, D)."""
    rows, columns = grid
    # (…, h · w, D) -> (N, h / m, m, w / m, m, D); transposing 2 and 3 puts the patches of a block next to each other
    cells = patches.reshape(-1, rows // merge_size, merge_size, columns // merge_size, merge_size, patches.shape[-1])
    return cells.transpose(2, 3).reshape(patches.shape)


def from_blocks(patches: Tensor, grid: tuple[int, int], merge_size: int) -> Tensor:
    """Reverses `to_blocks`, (…, h · w, D) -> (…, h · w, D)."""
    rows, columns = grid
    # (…, h · w, D) -> (N, h / m, w / m, m, m, D), and back by the same transposition
    cells = patches.reshape(-1, rows // merge_size, columns // merge_size, merge_size, merge_size, patches.shape[-1])
    return cells.transpose(2, 3).reshape(patches.shape)


class _MergerInput(nn.Module):
    """Replaces a merger in the tower and returns the merger's input, one row per block of patches."""

    def __init__(self, block_size: int) -> None:
        super().__init__()
        self.block_size = block_size

    def forward(self, hidden: Tensor) -> Tensor:
        """(block_size · N, D) -> (N, block_size · D)."""
        return hidden.reshape(-1, self.block_size * hidden.shape[-1])


class QwenVisionEncoder(nn.Module):
    """The vision tower of a Qwen-VL model without its mergers, with the interface of `VisionEncoder`.

    Features are the inputs of the mergers: those of the last block, followed by those of the DeepStack layers of
    Qwen3-VL (https://arxiv.org/abs/2406.04334), so that a feature cache holds everything that training needs.

    Args:
        tower: Vision tower of transformers; its mergers are replaced.
        transform: Transform that the data workers apply to frames.
        preprocessing: Mean and standard deviation, which the encoder applies on the device.
    """

    mean: Tensor
    std: Tensor
    feature_layer = -1
    max_tiles = 1

    def __init__(self, tower: Any, *, transform: ClipTransform, preprocessing: Preprocessing) -> None:
        super().__init__()
        block_size = transform.merge_size**2
        # The tower calls its mergers inside of its forward, so they are replaced and not just left out.
        tower.merger = _MergerInput(block_size)
        self.num_deep_layers = len(getattr(tower, "deepstack_merger_list", ()))
        if self.num_deep_layers:
            tower.deepstack_merger_list = nn.ModuleList([_MergerInput(block_size) for _ in range(self.num_deep_layers)])
        self.tower, self.transform = tower, transform
        self.embed_dim = (1 + self.num_deep_layers) * int(tower.patch_embed.embed_dim)
        self.register_buffer("mean", torch.tensor(preprocessing.mean).view(3, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(preprocessing.std).view(3, 1) * 255, persistent=False)

    @property
    def num_patches(self) -> int:
        """Maximum P."""
        return self.transform.max_patches

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w) of a square frame that fills the budget."""
        # Rounded down to whole blocks.
        side = math.isqrt(self.num_patches) // self.transform.merge_size * self.transform.merge_size
        return side, side

    def possible_grids(self, num_frames: int) -> Sequence[GridTHW]:
        """Returns all possible (T, h, w) of a clip of F frames."""
        return self.transform.possible_grids(num_frames)

    def forward(self, frames: Tensor, grid_thw: Sequence[GridTHW] | None = None) -> Tensor:
        """Encodes clips to patch features, uint8 (B, T, P, 3 · t · p · p) -> (B, T, P, Dv), with zeros for padding."""
        assert grid_thw is not None, "clips of this encoder need grid_thw"
        merge, (num_steps, num_patches) = self.transform.merge_size, frames.shape[1:3]
        # 1. The real patches of all clips in one sequence, in the order of merging.
        clips = [
            to_blocks(clip[:steps, : h * w], (h, w), merge)
            for clip, (steps, h, w) in zip(frames, grid_thw, strict=True)
        ]
        flat = torch.cat([clip.flatten(0, 1) for clip in clips])  # B × (T, P, …) -> (merge² · N, 3 · t · p · p)
        # 2. Normalise and encode.
        # (merge² · N, 3 · t · p · p) -> (merge² · N, 3, t · p · p): a mean per channel
        pixels = (flat.unflatten(-1, (3, -1)).to(self.mean.dtype) - self.mean) / self.std
        sizes = on_device(grid_thw, frames.device)
        output = self.tower(pixels.flatten(1).to(self.tower.patch_embed.proj.weight.dtype), grid_thw=sizes)
        # 3. Concatenate the layers of each patch: (1 + n) × (N, merge² · D) -> (merge² · N, Dv)
        layers = [output.pooler_output, *(output.deepstack_features if self.num_deep_layers else ())]
        # (N, merge² · D) -> (N, merge², D), whose last axes are joined to Dv
        blocks = torch.cat([layer.unflatten(-1, (merge**2, -1)) for layer in layers], dim=-1).flatten(0, 1)
        # 4. Row-major and padded: (merge² · N, Dv) -> (B, T, P, Dv). Clips are padded and stacked instead of written
        # into zeros, because autograd refuses to write into a row of an iterated tensor.
        ends = [steps * h * w for steps, h, w in grid_thw]
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
        merge_size: Patches per side that become one token.
        grid: Grid (h, w) of a square frame that fills the budget.
    """

    merge_size: int
    grid: tuple[int, int]

    def num_tokens(self, num_frames: int, grid: tuple[int, int] | None = None) -> int:
        """Returns V for T temporal patches of h × w patches."""
        rows, columns = grid or self.grid
        return num_frames * rows * columns // self.merge_size**2


class MergerProjector(nn.Module):
    """Merges 2 × 2 patches into one token with the checkpoint's own mergers.

    Weights stay in float32 and the input is cast to it. Autocast is disabled for float16, whose largest number is
    65 504.

    Args:
        mergers: Merger of the last layer, then one for each DeepStack layer.
        spec: Sizes of the mergers.
    """

    def __init__(self, mergers: Sequence[nn.Module], spec: MergerSpec) -> None:
        super().__init__()
        self.mergers = nn.ModuleList(mergers)
        self.spec = spec

    def num_tokens(self, num_frames: int, num_patches: int, grid: tuple[int, int] | None = None) -> int:
        """Returns V for T temporal patches of P patches, without running."""
        return self.spec.num_tokens(num_frames, grid or (1, num_patches))

    def forward(self, features: Tensor, grid: tuple[int, int] | None = None, prompt: Tensor | None = None) -> Tensor:
        """Projects features to visual tokens, (B, T, P, Dv) -> float32 (B, V, (1 + n) · Dl).

        The tokens of the DeepStack layers follow the token of the last layer along the width.
        """
        assert grid is not None, "clips of this projector need a grid"
        with autocast_without_float16(features):
            # (B, T, P, Dv) -> (1 + n) × (B, T, P, D)
            layers = to_blocks(features, grid, self.spec.merge_size).float().chunk(len(self.mergers), dim=-1)
            tokens = [  # (B · T · P, D) -> (N, Dl)
                merger(layer.flatten(0, 2).contiguous()) for merger, layer in zip(self.mergers, layers, strict=True)
            ]
        return torch.cat(tokens, dim=-1).float().unflatten(0, (len(features), -1))  # -> (B, V, (1 + n) · Dl)
