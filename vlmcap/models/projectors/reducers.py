"""Fewer visual tokens in front of the projection: on a smaller grid, or by content.

By content, the choice is made on the encoder's features and applied to the tokens that carry their position already, so
that a token knows where it was. Grids are resized by products of matrices, as the gradients of torch's own kernels are
not deterministic on CUDA.

Legend: B batch, F frames, N = B · F, P patches a frame (row-major over a grid h × w), K tokens that are left, D width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmcap.config import Reducer, TokenProjectorConfig
from vlmcap.models.projectors.base import Grid


def reduced_grid(config: TokenProjectorConfig, grid: Grid) -> Grid:
    """Grid of a frame in front of the projection; merge and saliency choose from it later."""
    if config.reducer is Reducer.pool:
        return math.ceil(grid[0] / config.pool_size), math.ceil(grid[1] / config.pool_size)
    return (config.resample_size, config.resample_size) if config.reducer is Reducer.resample else grid


def num_chosen(reducer: Reducer, keep_ratio: float, num_frames: int, num_patches: int) -> int:
    """Tokens of a clip that merge or saliency leaves.

    A share of each frame, or of the clip with at least one per frame.
    """
    if reducer is Reducer.merge:
        return num_frames * _share(keep_ratio, num_patches)
    return max(num_frames, _share(keep_ratio, num_frames * num_patches))


def _share(ratio: float, count: int) -> int:
    return math.ceil(ratio * count - 1e-9)  # 0.07 · 100 is 7.000000000000001


def resize(config: TokenProjectorConfig, features: Tensor, grid: Grid) -> Tensor:
    """Features on the grid that the configuration's reducer leaves, (B, F, P, D) -> (B, F, P', D)."""
    if config.reducer is Reducer.pool:
        return pool_grid(features, grid, config.pool_size)
    return resize_grid(features, grid, reduced_grid(config, grid))


def pool_grid(features: Tensor, grid: Grid, size: int) -> Tensor:
    """Averages size × size neighbouring patches of each frame, (B, F, P, D) -> (B, F, P', D).

    Windows that pass the edge of an odd grid average what is there. LLaVA-NeXT-Video pools 2 × 2 so: 576 patches become
    144.
    """
    maps = features.flatten(0, 1).transpose(1, 2).unflatten(2, grid)  # (B, F, P, D) -> (N, D, h, w)
    pooled = F.avg_pool2d(maps, size, ceil_mode=True, count_include_pad=False)
    return pooled.flatten(2).transpose(1, 2).unflatten(0, features.shape[:2])


def stack_frames(features: Tensor, size: int) -> Tensor:
    """Features of `size` consecutive frames at each place joined into one wider token, (B, F, P, D) -> (B, ⌈F / size⌉, P, size · D).

    The last frame of a clip, or an image, is repeated until it fills a stack. A token then holds how its place changes
    in time, which direction of motion needs; the number of visual tokens falls by `size`. Qwen2-VL's temporal patches
    join two frames in the same way, before the encoder (https://arxiv.org/abs/2409.12191).
    """
    if missing := -features.shape[1] % size:
        features = torch.cat([features, features[:, -1:].expand(-1, missing, -1, -1)], dim=1)
    return features.unflatten(1, (-1, size)).transpose(2, 3).flatten(3)


def merge_tokens(features: Tensor, tokens: Tensor, keep_ratio: float) -> Tensor:
    """Averages the most similar tokens of a frame until a share is left, in order of their places.

    Bipartite soft matching in rounds, as in ToMe (Bolya et al., "Token Merging: Your ViT But Faster",
    https://arxiv.org/abs/2210.09461): every other token may join the most similar of those between, and the most
    similar pairs do.

    Args:
        features: (B, F, P, D), which decide what is similar.
        tokens: (B, F, P, D), which are averaged.
        keep_ratio: Share of a frame's tokens that is left.

    Returns:
        (B, F, K, D).
    """
    num_kept = num_chosen(Reducer.merge, keep_ratio, 1, features.shape[2])
    group = assign_groups(features.flatten(0, 1), num_kept)
    return average_groups(tokens.flatten(0, 1), group, num_kept).unflatten(0, features.shape[:2])


def keep_salient(features: Tensor, tokens: Tensor, grid: Grid, keep_ratio: float) -> tuple[Tensor, Tensor]:
    """Keeps a fixed share of a clip's tokens, more in frames and regions that differ from what is around them in time and space.

    At least one token per frame is kept, and the kept stand in order of frame and place.

    Args:
        features: (B, F, P, D), which decide what differs.
        tokens: (B, F, P, D), of which some are kept.
        grid: (h, w).
        keep_ratio: Share of the clip's tokens that is left.

    Returns:
        The kept tokens and the frame of each, (B, 1, K, D) and int64 (B, K).
    """
    _, num_frames, num_patches, width = tokens.shape
    scores = saliency(features, grid)
    first = scores.argmax(-1, keepdim=True)
    scores = scores.scatter(-1, first, torch.inf).flatten(1)
    num_kept = num_chosen(Reducer.saliency, keep_ratio, num_frames, num_patches)
    kept = scores.argsort(dim=1, descending=True, stable=True)[:, :num_kept].sort(dim=1).values
    chosen = tokens.flatten(1, 2).gather(1, kept.unsqueeze(-1).expand(-1, -1, width))
    return chosen.unsqueeze(1), kept // num_patches


@torch.no_grad()
def assign_groups(features: Tensor, num_kept: int) -> Tensor:
    """Group of each token, (N, P, D) -> int64 (N, P) in 0…num_kept - 1, in order of place."""
    num_items, num_left = features.shape[:2]
    group = torch.arange(num_left, device=features.device).repeat(num_items, 1)
    merged = features
    while num_left > num_kept:
        num_merged = min(num_left - num_kept, num_left // 2)
        group, num_left = _match(merged, num_merged).gather(1, group), num_left - num_merged
        merged = average_groups(features, group, num_left)
    return group


def _match(features: Tensor, num_merged: int) -> Tensor:
    """New index of each token after one round, int64 (N, n)."""
    directions = F.normalize(features, dim=-1)
    similarity, partner = (directions[:, ::2] @ directions[:, 1::2].transpose(1, 2)).max(dim=-1)
    merged = similarity.argsort(dim=-1, descending=True, stable=True)[:, :num_merged]
    target = torch.arange(features.shape[1], device=features.device).repeat(len(features), 1)
    is_kept = torch.ones_like(target).scatter(1, 2 * merged, 0)
    target = target.scatter(1, 2 * merged, 2 * partner.gather(1, merged) + 1)
    return (is_kept.cumsum(1) - 1).gather(1, target)


def average_groups(tokens: Tensor, group: Tensor, num_groups: int) -> Tensor:
    """Mean of each group, (N, P, D) -> (N, K, D).

    As a product of matrices, since adding by index is not deterministic on CUDA.
    """
    members = (group.unsqueeze(1) == torch.arange(num_groups, device=group.device).unsqueeze(1)).to(tokens.dtype)
    return members @ tokens / members.sum(-1, keepdim=True)


@torch.no_grad()
def saliency(features: Tensor, grid: Grid) -> Tensor:
    """How much each patch differs from its place in the frames beside, plus from the patches around it, (B, F, P, D) -> (B, F, P).

    Differences are squared distances of directions, so that equal frames differ by exactly 0; each kind is divided by
    its mean over the clip, so that neither outweighs the other.
    """
    directions = F.normalize(features, dim=-1)
    change, contrast = _change(directions), _contrast(directions, grid)
    return _relative(change) + _relative(contrast)


def _relative(scores: Tensor) -> Tensor:
    return scores / (scores.mean((1, 2), keepdim=True) + 1e-6)


def _change(directions: Tensor) -> Tensor:
    steps = (directions[:, 1:] - directions[:, :-1]).square().sum(-1)
    if not steps.shape[1]:
        return directions.new_zeros(directions.shape[:3])
    before, after = torch.cat([steps[:, :1], steps], dim=1), torch.cat([steps, steps[:, -1:]], dim=1)
    return (before + after) / 2


def _contrast(directions: Tensor, grid: Grid) -> Tensor:
    maps = directions.flatten(0, 1).transpose(1, 2).unflatten(2, grid)
    around = F.avg_pool2d(maps, 3, stride=1, padding=1, count_include_pad=False)
    return (maps - around).square().sum(1).flatten(1).unflatten(0, directions.shape[:2])


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
    """Share of each old sample in each new one, (new, old), rows summing to 1.

    A triangle as wide as the larger of both spacings.
    """
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
