"""Reducers, which leave fewer visual tokens for the projection: by a smaller grid, or by content.

Reduction by content compares the encoder's features and is applied to tokens with position embeddings, so that the
tokens that are left encode where they were. Grids are resized by matrix products, because the gradients of PyTorch's
interpolation kernels are not deterministic on CUDA.

Legend: B batch, F frames, N = B · F, P patches per frame (row-major over a grid h × w), K remaining tokens, D width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmcap.config import Reducer, TokenProjectorConfig
from vlmcap.models.projectors.base import Grid


def reduced_grid(config: TokenProjectorConfig, grid: Grid) -> Grid:
    """Returns the grid of a frame after pooling or resampling; merge and saliency reduce its tokens later."""
    if config.reducer is Reducer.pool:
        return math.ceil(grid[0] / config.pool_size), math.ceil(grid[1] / config.pool_size)
    return (config.resample_size, config.resample_size) if config.reducer is Reducer.resample else grid


def num_chosen(reducer: Reducer, keep_ratio: float, num_frames: int, num_patches: int) -> int:
    """Returns how many tokens of a clip merge or saliency leaves.

    Merge leaves a share of each frame, saliency a share of the clip with at least one token per frame.
    """
    if reducer is Reducer.merge:
        return num_frames * _share(keep_ratio, num_patches)
    # At least one token per frame.
    return max(num_frames, _share(keep_ratio, num_frames * num_patches))


def _share(ratio: float, count: int) -> int:
    return math.ceil(ratio * count - 1e-9)  # because 0.07 · 100 is 7.000000000000001


def resize(config: TokenProjectorConfig, features: Tensor, grid: Grid) -> Tensor:
    """Resizes features to the grid of the configured reducer, (B, F, P, D) -> (B, F, P', D)."""
    if config.reducer is Reducer.pool:
        return pool_grid(features, grid, config.pool_size)
    return resize_grid(features, grid, reduced_grid(config, grid))


def pool_grid(features: Tensor, grid: Grid, size: int) -> Tensor:
    """Averages size × size neighbouring patches of each frame, (B, F, P, D) -> (B, F, P', D).

    Windows that extend beyond the edge of an odd grid average the patches inside. LLaVA-NeXT-Video pools 2 × 2 in this
    way, from 576 to 144 patches.
    """
    maps = features.flatten(0, 1).transpose(1, 2).unflatten(2, grid)  # (B, F, P, D) -> (N, D, h, w)
    # Cells at the border average the patches that exist.
    pooled = F.avg_pool2d(maps, size, ceil_mode=True, count_include_pad=False)
    return pooled.flatten(2).transpose(1, 2).unflatten(0, features.shape[:2])  # (N, D, h', w') -> (B, F, P', D)


def stack_frames(features: Tensor, size: int) -> Tensor:
    """Joins `size` consecutive frames at each place into a wider token, (B, F, P, D) -> (B, ⌈F / size⌉, P, size · D).

    The last frame of a clip, or an image, is repeated to fill its stack. A token then shows how its place changes over
    time, including the direction of motion, and there are `size` times fewer visual tokens. Qwen2-VL's temporal patches
    join two frames in the same way, before the encoder (https://arxiv.org/abs/2409.12191).
    """
    if missing := -features.shape[1] % size:
        features = torch.cat([features, features[:, -1:].expand(-1, missing, -1, -1)], dim=1)
    # (B, F, P, D) -> (B, F / size, P, size, D) -> (B, F / size, P, size · D)
    return features.unflatten(1, (-1, size)).transpose(2, 3).flatten(3)


def merge_tokens(features: Tensor, tokens: Tensor, keep_ratio: float) -> Tensor:
    """Averages the most similar tokens of each frame until a share is left, in order of their places.

    This is bipartite soft matching in rounds, as in ToMe (Bolya et al., "Token Merging: Your ViT But Faster",
    https://arxiv.org/abs/2210.09461): each token at an even index is paired with the most similar one at an odd index,
    and the most similar pairs are merged.

    Args:
        features: (B, F, P, D), whose similarity decides.
        tokens: (B, F, P, D), which are averaged.
        keep_ratio: Share of a frame's tokens that is left.

    Returns:
        (B, F, K, D).
    """
    num_kept = num_chosen(Reducer.merge, keep_ratio, 1, features.shape[2])
    group = assign_groups(features.flatten(0, 1), num_kept)
    return average_groups(tokens.flatten(0, 1), group, num_kept).unflatten(0, features.shape[:2])


def keep_salient(features: Tensor, tokens: Tensor, grid: Grid, keep_ratio: float) -> tuple[Tensor, Tensor]:
    """Keeps the most salient share of a clip's tokens, those that differ most from their neighbours in time and space.

    At least one token per frame is kept, and the kept tokens stay in order of frame and place.

    Args:
        features: (B, F, P, D), whose saliency decides.
        tokens: (B, F, P, D), from which tokens are kept.
        grid: (h, w).
        keep_ratio: Share of the clip's tokens that is left.

    Returns:
        The kept tokens, (B, 1, K, D), and the frame of each, int64 (B, K).
    """
    _, num_frames, num_patches, width = tokens.shape
    scores = saliency(features, grid)
    best = scores.argmax(-1, keepdim=True)  # (B, F, P) -> (B, F, 1): always kept
    scores = scores.scatter(-1, best, torch.inf).flatten(1)  # (B, F, P) -> (B, F · P)
    num_kept = num_chosen(Reducer.saliency, keep_ratio, num_frames, num_patches)
    kept = scores.argsort(dim=1, descending=True, stable=True)[:, :num_kept].sort(dim=1).values  # -> (B, K)
    chosen = tokens.flatten(1, 2).gather(1, kept.unsqueeze(-1).expand(-1, -1, width))  # (B, F, P, D) -> (B, K, D)
    # (B, K, D) -> (B, 1, K, D), and the frame of each token
    return chosen.unsqueeze(1), kept // num_patches


@torch.no_grad()
def assign_groups(features: Tensor, num_kept: int) -> Tensor:
    """Assigns each token to one of `num_kept` groups in order of place, (N, P, D) -> int64 (N, P)."""
    num_items, num_left = features.shape[:2]
    group = torch.arange(num_left, device=features.device).repeat(num_items, 1)
    merged = features
    while num_left > num_kept:
        # A round can merge at most half of the tokens, as each even one goes to an odd one.
        num_merged = min(num_left - num_kept, num_left // 2)
        # The index after this round, of the group before it.
        group, num_left = _merge_round(merged, num_merged).gather(1, group), num_left - num_merged
        merged = average_groups(features, group, num_left)
    return group


def _merge_round(features: Tensor, num_merged: int) -> Tensor:
    """Returns the new index of each token after one round of merging, int64 (N, P)."""
    directions = F.normalize(features, dim=-1)
    # (N, ⌈P / 2⌉): the most similar odd token of each even one.
    similarity, partner = (directions[:, ::2] @ directions[:, 1::2].transpose(1, 2)).max(dim=-1)
    merged = similarity.argsort(dim=-1, descending=True, stable=True)[:, :num_merged]
    # Each token stays itself, except for merged even ones, which become their odd partner.
    target = torch.arange(features.shape[1], device=features.device).repeat(len(features), 1)
    is_kept = torch.ones_like(target).scatter(1, 2 * merged, 0)
    target = target.scatter(1, 2 * merged, 2 * partner.gather(1, merged) + 1)
    # The remaining tokens are numbered again from 0, in order of place.
    return (is_kept.cumsum(1) - 1).gather(1, target)


def average_groups(tokens: Tensor, group: Tensor, num_groups: int) -> Tensor:
    """Averages each group, (N, P, D) -> (N, K, D), by a matrix product, as `index_add` is not deterministic on CUDA."""
    # (N, K, P): 1 where a token belongs to a group
    members = (group.unsqueeze(1) == torch.arange(num_groups, device=group.device).unsqueeze(1)).to(tokens.dtype)
    return members @ tokens / members.sum(-1, keepdim=True)


@torch.no_grad()
def saliency(features: Tensor, grid: Grid) -> Tensor:
    """Scores how much each patch differs from adjacent frames and surrounding patches, (B, F, P, D) -> (B, F, P).

    Differences are squared distances of normalised features, so that equal frames differ by exactly 0. The temporal and
    the spatial difference are each divided by their mean over the clip, so that neither dominates.
    """
    directions = F.normalize(features, dim=-1)
    return _divide_by_mean(_temporal_change(directions)) + _divide_by_mean(_spatial_contrast(directions, grid))


def _divide_by_mean(scores: Tensor) -> Tensor:
    # Against a division by 0 in a still, uniform clip.
    return scores / (scores.mean((1, 2), keepdim=True) + 1e-6)


def _temporal_change(directions: Tensor) -> Tensor:
    """Returns the mean difference to the previous and the next frame, (B, F, P, D) -> (B, F, P)."""
    steps = (directions[:, 1:] - directions[:, :-1]).square().sum(-1)  # (B, F - 1, P)
    if not steps.shape[1]:
        return directions.new_zeros(directions.shape[:3])
    # The first frame has no previous one, and the last no next one: the other difference counts twice.
    before, after = torch.cat([steps[:, :1], steps], dim=1), torch.cat([steps, steps[:, -1:]], dim=1)
    return (before + after) / 2


def _spatial_contrast(directions: Tensor, grid: Grid) -> Tensor:
    """Returns the difference to the mean of the surrounding 3 × 3 patches, (B, F, P, D) -> (B, F, P)."""
    maps = directions.flatten(0, 1).transpose(1, 2).unflatten(2, grid)  # (B, F, P, D) -> (N, D, h, w)
    around = F.avg_pool2d(maps, 3, stride=1, padding=1, count_include_pad=False)
    return (maps - around).square().sum(1).flatten(1).unflatten(0, directions.shape[:2])  # -> (B, F, P)


def resize_grid(tokens: Tensor, old: Grid, new: Grid) -> Tensor:
    """Resizes bilinearly, with antialiasing when downsampling, (..., P, D) -> (..., P', D)."""
    if old == new:
        return tokens
    rows, columns = (linear_weights(source, target, tokens.device) for source, target in zip(old, new, strict=True))
    # (..., h, w, D) -> (..., h', w', D) -> (..., P', D)
    return torch.einsum("ah,bw,...hwd->...abd", rows, columns, tokens.unflatten(-2, old)).flatten(-3, -2)


def pool_maps(maps: Tensor, side: int) -> Tensor:
    """Applies adaptive average pooling to a square, (N, C, h, w) -> (N, C, side, side)."""
    rows, columns = (area_weights(size, side, maps.device).to(maps.dtype) for size in maps.shape[-2:])
    return torch.einsum("ah,bw,nchw->ncab", rows, columns, maps)


def linear_weights(old: int, new: int, device: torch.device | None = None) -> Tensor:
    """Returns the weights of bilinear resampling, (new, old), with rows that sum to 1.

    The kernel is a triangle of the larger of both spacings.
    """
    scale = old / new
    centers = (torch.arange(new, device=device) + 0.5) * scale
    distances = (torch.arange(old, device=device) + 0.5 - centers[:, None]).abs()
    # A triangle around each new sample, wider when downsampling, which is the antialiasing.
    weights = (1 - distances / max(scale, 1.0)).clamp(min=0)
    return weights / weights.sum(1, keepdim=True)


def area_weights(old: int, new: int, device: torch.device | None = None) -> Tensor:
    """Returns the weights of adaptive average pooling, (new, old): equal for all old samples that a new one covers."""
    new_index, old_index = torch.arange(new, device=device)[:, None], torch.arange(old, device=device)
    is_touched = (old_index >= new_index * old // new) & (old_index * new < (new_index + 1) * old)
    return is_touched / is_touched.sum(1, keepdim=True)
