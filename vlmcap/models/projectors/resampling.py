"""Grids of features brought to another size, as products of matrices: the gradients of torch's kernels are not deterministic on CUDA.

Legend: P patches (row-major over a grid h × w), D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

Grid = tuple[int, int]


def resize_grid(tokens: Tensor, old: Grid, new: Grid) -> Tensor:
    """Bilinear resize, antialiased where it gets smaller, (..., P, D) -> (..., P', D)."""
    if old == new:
        return tokens
    rows, columns = (linear_weights(there, here, tokens.device) for there, here in zip(old, new, strict=True))
    return torch.einsum("ah,bw,...hwd->...abd", rows, columns, tokens.unflatten(-2, old)).flatten(-3, -2)


def pool_maps(maps: Tensor, side: int) -> Tensor:
    """Adaptive average pooling to a square, (N, C, h, w) -> (N, C, side, side)."""
    rows, columns = (area_weights(size, side, maps.device).to(maps.dtype) for size in maps.shape[-2:])
    return torch.einsum("ah,bw,nchw->ncab", rows, columns, maps)


def linear_weights(old: int, new: int, device: torch.device | None = None) -> Tensor:
    """Share of each old sample in each new one, (new, old), rows summing to 1: a triangle as wide as the larger of both spacings."""
    scale = old / new
    centers = (torch.arange(new, device=device) + 0.5) * scale
    distances = (torch.arange(old, device=device) + 0.5 - centers[:, None]).abs()
    weights = (1 - distances / max(scale, 1.0)).clamp(min=0)
    return weights / weights.sum(1, keepdim=True)


def area_weights(old: int, new: int, device: torch.device | None = None) -> Tensor:
    """Share of each old sample in each new one, (new, old): equal for all old ones that a new one touches."""
    index, places = torch.arange(new, device=device)[:, None], torch.arange(old, device=device)
    is_touched = (places >= index * old // new) & (places * new < (index + 1) * old)
    return is_touched / is_touched.sum(1, keepdim=True)
