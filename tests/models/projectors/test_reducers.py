"""Reducers that keep a grid match PyTorch and LLaVA-NeXT-Video.

Those that choose by content, against ToMe and by what they keep.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vlmcap.config import ProjectorConfig
from vlmcap.models.projectors import ProjectorSizes, build_projector
from vlmcap.models.projectors.reducers import (
    assign_groups,
    keep_salient,
    linear_weights,
    merge_tokens,
    pool_grid,
    pool_maps,
    resize_grid,
    stack_frames,
)

Make = Callable[..., tuple[ProjectorConfig, ProjectorSizes]]


def test_pooling_averages_neighbours_and_what_is_there_at_an_odd_edge() -> None:
    features = torch.randn(1, 1, 9, 2)
    maps = features.reshape(3, 3, 2)
    expected = [maps[:2, :2].mean((0, 1)), maps[:2, 2].mean(0), maps[2, :2].mean(0), maps[2, 2]]
    torch.testing.assert_close(pool_grid(features, (3, 3), 2)[0, 0], torch.stack(expected))


def test_pooling_is_llava_next_videos() -> None:
    from transformers import CLIPVisionConfig, LlavaNextVideoConfig
    from transformers.models.llava_next_video.modeling_llava_next_video import LlavaNextVideoPooler

    vision: Any = CLIPVisionConfig(hidden_size=6, num_attention_heads=1, image_size=336, patch_size=14)
    theirs = LlavaNextVideoPooler(LlavaNextVideoConfig(vision_config=vision))
    features = torch.randn(3, 576, 6)
    torch.testing.assert_close(pool_grid(features[None], (24, 24), 2)[0], theirs(features), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("grid", "size"), [((27, 27), 12), ((24, 24), 12), ((5, 9), 12), ((12, 12), 12), ((7, 30), 3), ((1, 1), 2)]
)
def test_resampling_is_torchs_antialiased_interpolation(grid: tuple[int, int], size: int) -> None:
    features = torch.randn(2, 3, grid[0] * grid[1], 4)
    maps = features.flatten(0, 1).transpose(1, 2).unflatten(2, grid)
    expected = (
        F.interpolate(maps, (size, size), mode="bilinear", antialias=True)
        .flatten(2)
        .transpose(1, 2)
        .unflatten(0, (2, 3))
    )
    torch.testing.assert_close(resize_grid(features, grid, (size, size)), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("old", "new"), [((4, 4), (4, 4)), ((4, 4), (8, 6)), ((3, 5), (5, 9)), ((1, 1), (2, 3))])
def test_a_larger_grid_is_interpolated_bilinearly(old: tuple[int, int], new: tuple[int, int]) -> None:
    tokens = torch.randn(1, old[0] * old[1], 4)
    expected = F.interpolate(tokens.transpose(1, 2).unflatten(2, old), new, mode="bilinear").flatten(2).transpose(1, 2)
    torch.testing.assert_close(resize_grid(tokens, old, new), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("grid", [(27, 27), (24, 24), (5, 7), (12, 3), (1, 1)])
@pytest.mark.parametrize("side", [1, 2, 5, 12])
def test_pooling_to_a_square_is_torchs_adaptive_pooling(grid: tuple[int, int], side: int) -> None:
    maps = torch.randn(2, 3, *grid)
    torch.testing.assert_close(pool_maps(maps, side), F.adaptive_avg_pool2d(maps, side), atol=1e-6, rtol=1e-5)


def test_weights_of_a_sample_sum_to_one() -> None:
    for old, new in itertools.product((1, 2, 7, 27), (1, 3, 12, 40)):
        torch.testing.assert_close(linear_weights(old, new).sum(1), torch.ones(new))


def test_frame_stack_joins_one_place_over_time() -> None:
    features = torch.arange(4 * 3 * 2).reshape(1, 4, 3, 2)  # (B, F, P, Dv)
    stacked = stack_frames(features, 2)
    assert stacked.shape == (1, 2, 3, 4)
    for stack, place in itertools.product(range(2), range(3)):
        assert stacked[0, stack, place].tolist() == [
            *features[0, 2 * stack, place].tolist(),
            *features[0, 2 * stack + 1, place].tolist(),
        ]


def merge_slowly(features: Tensor, num_kept: int) -> tuple[Tensor, list[list[int]]]:
    """ToMe with lists: running averages weighted by size, and the members of each token, (P, D) -> (K, D)."""
    tokens = [(feature, 1, [place]) for place, feature in enumerate(features)]
    while len(tokens) > num_kept:
        sources, targets = tokens[::2], tokens[1::2]
        similar = [[float(torch.cosine_similarity(a[0], b[0], dim=0)) for b in targets] for a in sources]
        best = sorted(range(len(sources)), key=lambda i: -max(similar[i]))[
            : min(len(tokens) - num_kept, len(tokens) // 2)
        ]
        merged = list(targets)
        for i in best:
            j = similar[i].index(max(similar[i]))
            (one, size, places), (other, other_size, other_places) = sources[i], merged[j]
            mean = (one * size + other * other_size) / (size + other_size)
            merged[j] = (mean, size + other_size, places + other_places)
        kept = {2 * i: sources[i] for i in range(len(sources)) if i not in best} | {
            2 * j + 1: token for j, token in enumerate(merged)
        }
        tokens = [kept[place] for place in sorted(kept)]
    return torch.stack([token[0] for token in tokens]), [sorted(token[2]) for token in tokens]


@pytest.mark.parametrize(("num_patches", "num_kept"), [(16, 4), (15, 7), (9, 1), (16, 15), (7, 7), (2, 1)])
def test_merging_is_tome_in_rounds(num_patches: int, num_kept: int) -> None:
    features = torch.randn(2, 3, num_patches, 5, generator=torch.Generator().manual_seed(0))
    merged = merge_tokens(features, features, num_kept / num_patches)
    assert merged.shape == (2, 3, num_kept, 5)
    for clip, frame in ((0, 0), (1, 2)):
        expected, members = merge_slowly(features[clip, frame], num_kept)
        torch.testing.assert_close(merged[clip, frame], expected, atol=1e-6, rtol=1e-5)
        group = assign_groups(features[clip, frame][None], num_kept)[0]
        assert [group.eq(token).nonzero().flatten().tolist() for token in range(num_kept)] == members


def test_equal_patches_become_one() -> None:
    colours = torch.eye(4)[torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])]
    merged = merge_tokens(colours[None, None], colours[None, None], 0.5)
    torch.testing.assert_close(merged[0, 0], torch.eye(4))


def test_merging_carries_the_positions_of_what_it_joins(spec_of: Make) -> None:
    """Similarity depends on the encoder's features only, so position embeddings do not keep equal patches apart."""
    projector = build_projector(*spec_of(temporal="position", reducer="merge"))
    with torch.no_grad():
        projector.before.position.patch.mul_(100)  # type: ignore[union-attr]
    colours = torch.randn(4, 6).repeat_interleave(4, 0).repeat(1, 4, 1, 1)
    tokens, _ = projector._prepare(colours, (4, 4), None)
    placed = projector.before(colours, (4, 4)).unflatten(2, (4, 4)).mean(3)  # type: ignore[misc]
    torch.testing.assert_close(tokens, placed)


def kept_per_frame(features: Tensor, grid: tuple[int, int], keep_ratio: float) -> list[int]:
    _, frame_of = keep_salient(features, features, grid, keep_ratio)
    return frame_of[0].bincount(minlength=features.shape[1]).tolist()


@pytest.mark.parametrize("keep_ratio", [0.001, 0.25, 0.3, 0.7, 1.0])
def test_the_budget_is_kept_in_order_of_frame_and_place(keep_ratio: float) -> None:
    places = torch.arange(2 * 5 * 12).float().reshape(2, 5, 12, 1)
    features = torch.randn(2, 5, 12, 6, generator=torch.Generator().manual_seed(0))
    tokens, frame_of = keep_salient(features, places, (3, 4), keep_ratio)
    assert tokens.shape == (2, 1, max(5, math.ceil(keep_ratio * 60)), 1)
    for clip in range(2):
        kept = tokens[clip, 0, :, 0].long() - 60 * clip
        assert kept.tolist() == sorted(set(kept.tolist()))
        assert frame_of[clip].tolist() == (kept // 12).tolist()
        assert frame_of[clip].unique().tolist() == list(range(5))


def test_repeated_frames_get_few_tokens() -> None:
    """Of a scene with four still and four moving frames, the moving ones get nearly the whole budget."""
    generator = torch.Generator().manual_seed(0)
    still = torch.randn(1, 1, 36, 16, generator=generator).expand(1, 4, 36, 16)
    moving = still[:, :1] + torch.randn(1, 4, 36, 16, generator=generator)
    counts = kept_per_frame(torch.cat([still, moving], dim=1), (6, 6), 0.25)
    assert sum(counts) == 72
    assert max(counts[:3]) <= 3 < 10 <= min(counts[4:])


def test_what_moves_and_what_stands_out_is_kept() -> None:
    """A grey scene with one still red patch and one blue patch that moves along the last row."""
    features = torch.ones(1, 4, 16, 3)
    features[:, :, 5] = torch.tensor([1.0, -1.0, 1.0])
    for frame in range(4):
        features[:, frame, 12 + frame] = torch.tensor([-1.0, 1.0, 1.0])
    tokens, frame_of = keep_salient(
        features, torch.arange(16.0).reshape(1, 1, 16, 1).expand(1, 4, 16, 1), (4, 4), 8 / 64
    )
    kept = {(int(frame), int(place)) for frame, place in zip(frame_of[0], tokens[0, 0, :, 0], strict=True)}
    assert {(frame, 12 + frame) for frame in range(4)} <= kept
    assert len(kept & {(frame, 5) for frame in range(4)}) >= 2


def test_a_still_clip_spends_its_budget_on_contrast() -> None:
    features = torch.randn(1, 1, 16, 6, generator=torch.Generator().manual_seed(0)).expand(1, 4, 16, 6)
    assert kept_per_frame(features, (4, 4), 0.25) == [4, 4, 4, 4]
    assert kept_per_frame(features[:, :1], (4, 4), 0.25) == [4]
