"""Reducers that keep a grid, against torch and LLaVA-NeXT-Video."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from vlmcap.models.projectors.reducers import PoolReducer, ResampleReducer, stack_frames
from vlmcap.models.projectors.resampling import linear_weights, pool_maps, resize_grid


def test_pooling_averages_neighbours_and_what_is_there_at_an_odd_edge() -> None:
    features = torch.randn(1, 1, 9, 2)
    maps = features.reshape(3, 3, 2)
    expected = [maps[:2, :2].mean((0, 1)), maps[:2, 2].mean(0), maps[2, :2].mean(0), maps[2, 2]]
    torch.testing.assert_close(PoolReducer(2)(features, (3, 3))[0, 0], torch.stack(expected))


def test_pooling_is_llava_next_videos() -> None:
    from transformers import CLIPVisionConfig, LlavaNextVideoConfig
    from transformers.models.llava_next_video.modeling_llava_next_video import LlavaNextVideoPooler

    vision: Any = CLIPVisionConfig(hidden_size=6, num_attention_heads=1, image_size=336, patch_size=14)
    theirs = LlavaNextVideoPooler(LlavaNextVideoConfig(vision_config=vision))
    features = torch.randn(3, 576, 6)
    torch.testing.assert_close(PoolReducer(2)(features[None], (24, 24))[0], theirs(features), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(("grid", "size"), [((27, 27), 12), ((24, 24), 12), ((5, 9), 12), ((12, 12), 12), ((7, 30), 3), ((1, 1), 2)])
def test_resampling_is_torchs_antialiased_interpolation(grid: tuple[int, int], size: int) -> None:
    features = torch.randn(2, 3, grid[0] * grid[1], 4)
    maps = features.flatten(0, 1).transpose(1, 2).unflatten(2, grid)
    expected = F.interpolate(maps, (size, size), mode="bilinear", antialias=True).flatten(2).transpose(1, 2).unflatten(0, (2, 3))
    torch.testing.assert_close(ResampleReducer(size)(features, grid), expected, atol=1e-5, rtol=1e-5)


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
        assert stacked[0, stack, place].tolist() == [*features[0, 2 * stack, place].tolist(), *features[0, 2 * stack + 1, place].tolist()]
