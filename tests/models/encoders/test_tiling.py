"""Frames cut into tiles, against InternVL's image processor."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.checkpoints.encoders import Checkpoint, hidden_state
from vlmcap.models.encoders.transforms import TileTransform

SIZES = [(90, 160), (160, 90), (300, 300), (41, 53), (100, 37), (60, 600), (720, 1280)]


def reference_tiles(frames: Tensor, size: int, max_tiles: int, **settings: Any) -> Tensor:
    from transformers import GotOcr2ImageProcessorPil

    processor = GotOcr2ImageProcessorPil(size={"height": size, "width": size}, crop_to_patches=True, max_patches=max_tiles, **settings)
    return torch.from_numpy(np.stack(processor([frame.permute(1, 2, 0).numpy() for frame in frames])["pixel_values"])).float()


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("max_tiles", [2, 6, 12])
def test_tiles_are_those_of_the_processor(film: Tensor, height: int, width: int, max_tiles: int) -> None:
    frames = film[:2, :, :height, :width].contiguous()
    transform = TileTransform(28, (2, 2), max_tiles)
    tiles, expected = transform(frames), reference_tiles(frames, 28, max_tiles, do_rescale=False, do_normalize=False)
    assert tiles.dtype == torch.uint8
    assert tiles.shape == expected.shape
    assert (tiles.float() - expected).abs().max() <= 2
    assert transform.grid_thw(2, height, width) == (len(tiles), 2, 2)


@torch.no_grad()
def test_features_of_tiles(checkpoints: dict[str, Checkpoint], film: Tensor) -> None:
    checkpoint = checkpoints["internvit"]
    encoder = checkpoint.load(max_tiles=6)
    mean_and_std = {"image_mean": checkpoint.processor.image_mean, "image_std": checkpoint.processor.image_std}
    expected = hidden_state(checkpoint, reference_tiles(film[:2], 56, 6, **mean_and_std), -1)
    features = encoder(encoder.transform(film[:2])[None])[0]
    assert features.shape == expected.shape == (2 * 3, 16, 32)
    assert torch.cosine_similarity(features, expected, dim=-1).min() >= 0.999


@torch.no_grad()
def test_a_batch_of_clips_of_different_shape(checkpoint: Checkpoint, film: Tensor) -> None:
    """A batch of two is two batches of one, and padding is not computed."""
    encoder = checkpoint.load(max_tiles=4)
    clips = [film[:2, :, :200, :200], film[:2, :, :100, :300]]
    tiles = [encoder.transform(clip) for clip in clips]
    grids = [encoder.transform.grid_thw(2, *clip.shape[-2:]) for clip in clips]
    assert grids == [(2, 4, 4), (8, 4, 4)] or grids == [(10, 4, 4), (8, 4, 4)]
    assert [len(clip) for clip in tiles] == [grid[0] for grid in grids if grid]
    longest = max(map(len, tiles))
    padded = torch.stack([torch.nn.functional.pad(clip, (0,) * 7 + (longest - len(clip),)) for clip in tiles])
    seen: list[int] = []
    encoder.tower.register_forward_pre_hook(lambda _module, _args, kwargs: seen.append(len(kwargs["pixel_values"])), with_kwargs=True)
    features = encoder(padded, grids)
    assert seen == [sum(map(len, tiles))]
    for row, clip in enumerate(tiles):
        torch.testing.assert_close(features[row, : len(clip)], encoder(clip[None])[0], atol=1e-5, rtol=1e-5)
        assert not features[row, len(clip) :].any()


def test_every_grid_of_a_clip_is_possible(checkpoint: Checkpoint) -> None:
    encoder = checkpoint.load(max_tiles=7)
    possible = encoder.possible_grids(3)
    sizes = np.random.default_rng(0).integers(16, 2000, (300, 2)).tolist()
    found = {encoder.transform.grid_thw(3, height, width) for height, width in sizes}
    assert found <= set(possible)
    assert len(found) > 4
    assert possible == [(3 * count, 4, 4) for count in (1, 3, 4, 5, 6, 7, 8)]
    assert encoder.max_tiles == 7
    assert checkpoint.load().possible_grids(3) == [(3, 4, 4)]
    assert checkpoint.load().transform.grid_thw(3, 100, 200) is None
