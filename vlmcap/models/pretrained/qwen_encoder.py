"""Qwen's vision towers up to their merger.

Legend: B batch, T temporal patches, P patches a frame (row-major over the grid h × w), D width of the tower, Dv (1 + n) · D with the n
DeepStack layers of Qwen3-VL behind the last one, N merged patches of all clips.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmcap.models.encoders.processor import Preprocessing
from vlmcap.models.pretrained.qwen_frames import ClipTransform, from_blocks, to_blocks
from vlmcap.types import GridTHW


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
        own = [to_blocks(clip[:steps, : h * w], (h, w), merge) for clip, (steps, h, w) in zip(frames, grid_thw, strict=True)]
        flat = torch.cat([clip.flatten(0, 1) for clip in own])
        pixels = (flat.unflatten(-1, (3, -1)).to(self.mean.dtype) - self.mean) / self.std
        sizes = torch.tensor(grid_thw, device=frames.device)
        output = self.tower(pixels.flatten(1).to(self.tower.patch_embed.proj.weight.dtype), grid_thw=sizes)
        layers = [output.pooler_output, *(output.deepstack_features if self.num_deep_layers else ())]
        blocks = torch.cat([layer.unflatten(-1, (merge**2, -1)) for layer in layers], dim=-1).flatten(0, 1)  # (4 · N, Dv)
        ends = [steps * h * w for steps, h, w in grid_thw]
        # Padded and stacked, not written into zeros: autograd refuses to write into a row of an iterated tensor.
        return torch.stack(
            [
                F.pad(from_blocks(clip.reshape(steps, h * w, -1), (h, w), merge), (0, 0, 0, num_patches - h * w, 0, num_steps - steps))
                for clip, (steps, h, w) in zip(blocks.split(ends), grid_thw, strict=True)
            ]
        )
