"""Qwen's patch mergers as a projector.

Legend: B batch, T temporal patches, P patches a frame (row-major over the grid h × w), Dv (1 + n) · D, V visual tokens a clip, Dl language
width, n DeepStack layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vlmcap.models.pretrained.qwen_frames import to_blocks
from vlmcap.models.projectors.precision import wide_autocast


@dataclass(frozen=True, slots=True)
class MergerSpec:
    """Sizes of the mergers.

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

    Weights stay in float32 and the input is cast at the edge; float16 autocast ends there too, as its largest number is 65 504.

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
        """Visual tokens, (B, T, P, Dv) -> float32 (B, V, (1 + n) · Dl); those of the DeepStack layers stand behind the token's own."""
        assert grid is not None, "clips of this projector have sizes of their own"
        with wide_autocast(features):
            layers = to_blocks(features, grid, self.spec.merge_size).float().chunk(len(self.mergers), dim=-1)
            tokens = [merger(layer.flatten(0, 2).contiguous()) for merger, layer in zip(self.mergers, layers, strict=True)]
        return torch.cat(tokens, dim=-1).float().unflatten(0, (len(features), -1))
