"""Sizes and patches of the Qwen family match transformers' processors."""

from __future__ import annotations

import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmcap.errors import UserError
from vlmcap.models.pretrained.qwen_vision import ClipTransform, from_blocks, smart_size, to_blocks

SIDES = st.integers(56, 2000)


@settings(deadline=None)
@given(SIDES, SIDES, st.sampled_from([16, 64, 256]), st.sampled_from([28, 32]))
def test_sizes_are_the_processors(height: int, width: int, max_blocks: int, factor: int) -> None:
    """Both rules amount to a budget per frame: the older one has it, the newer one counts all frames of a clip."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize as newer

    if max(height, width) / min(height, width) > max_blocks / 4:  # there the processors exceed their budget
        return
    rows, columns = smart_size(height, width, factor, max_blocks)
    pixels = factor**2
    assert (rows * factor, columns * factor) == smart_resize(height, width, factor, 4 * pixels, max_blocks * pixels)
    budget = {"min_pixels": 6 * 4 * pixels, "max_pixels": 6 * max_blocks * pixels}
    assert (rows * factor, columns * factor) == newer(6, height, width, 2, factor, **budget)


@settings(deadline=None)
@given(st.integers(1, 4000), st.integers(1, 4000), st.integers(1, 300))
def test_no_frame_exceeds_the_budget(height: int, width: int, max_blocks: int) -> None:
    rows, columns = smart_size(height, width, 28, max_blocks)
    assert min(rows, columns) >= 1
    assert rows * columns <= max_blocks


@pytest.mark.parametrize(("height", "width"), [(90, 160), (300, 90), (20, 700), (16, 16), (224, 224)])
def test_every_size_is_among_the_possible(height: int, width: int) -> None:
    transform = ClipTransform(14, 2, 2, max_patches=64)
    grid = transform.grid_thw(6, height, width)
    assert grid in transform.possible_grids(6)
    frames = torch.randint(0, 256, (6, 3, height, width), dtype=torch.uint8)
    patches = transform(frames)
    assert patches.dtype == torch.uint8
    assert patches.shape == (3, grid[1] * grid[2], 3 * 2 * 14 * 14)
    assert pickle.loads(pickle.dumps(transform)) == transform


def test_patches_are_the_processors() -> None:
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

    frames = torch.randint(0, 256, (4, 3, 56, 84), dtype=torch.uint8)
    patches = ClipTransform(14, 2, 2, max_patches=64)(frames)
    expected, *grid = Qwen3VLVideoProcessor.patchify(None, frames[None], 14, 2, 2)
    assert grid == [2, 4, 6]
    assert torch.equal(to_blocks(patches, (4, 6), 2).flatten(0, 1), expected[0])
    assert torch.equal(from_blocks(to_blocks(patches, (4, 6), 2), (4, 6), 2), patches)


def test_patches_are_in_row_major_order() -> None:
    frames = torch.zeros(2, 3, 56, 84, dtype=torch.uint8)
    frames[..., 14:28, 70:84] = 255
    bright = ClipTransform(14, 2, 2, max_patches=64)(frames)[0].float().mean(-1)
    assert bright.nonzero().flatten().tolist() == [1 * 6 + 5]


def test_frames_that_do_not_pair_up_are_refused() -> None:
    transform = ClipTransform(14, 2, 2, max_patches=64)
    with pytest.raises(UserError, match=r"data\.num_frames must be a multiple of 2, not 5") as caught:
        transform.possible_grids(5)
    assert "\n" not in str(caught.value)
