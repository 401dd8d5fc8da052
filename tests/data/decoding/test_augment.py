"""Augmentation is off by default, repeatable, equal for all frames of a clip, within its limits, and never mirrored."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vlmcap.config import AugmentConfig
from vlmcap.data.decoding.augment import augment_frames, crop_frames, recolor_frames


def noise(num_frames: int, height: int, width: int, seed: int = 0) -> Tensor:
    return torch.randint(
        0, 256, (num_frames, 3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


sizes = st.tuples(st.integers(1, 4), st.integers(1, 40), st.integers(1, 40))
shares = st.floats(0, 0.5)


@given(size=sizes, seed=st.integers(0, 1000))
def test_off_is_the_identity_and_still_draws_six_numbers(size: tuple[int, int, int], seed: int) -> None:
    frames, rng = noise(*size), np.random.default_rng(seed)
    assert augment_frames(frames, AugmentConfig(), rng) is frames
    other = np.random.default_rng(seed)
    other.random(6)
    assert rng.random() == other.random()


@settings(deadline=None)
@given(size=sizes, color=shares, crop=shares, seed=st.integers(0, 1000))
def test_shapes_and_draws(size: tuple[int, int, int], color: float, crop: float, seed: int) -> None:
    frames, augment = noise(*size), AugmentConfig(color, crop)
    before = frames.clone()
    changed = augment_frames(frames, augment, np.random.default_rng([seed, 1, 2]))
    assert torch.equal(changed, augment_frames(frames, augment, np.random.default_rng([seed, 1, 2])))
    assert torch.equal(frames, before)
    assert changed.dtype == torch.uint8
    assert changed.shape[:2] == frames.shape[:2]
    for kept, whole in zip(changed.shape[2:], frames.shape[2:], strict=True):
        assert max(1, whole * (1 - crop) - 1e-6) <= kept <= whole


@settings(deadline=None)
@given(size=sizes, share=shares, top=st.floats(0, 1), left=st.floats(0, 1))
def test_a_cut_is_a_window_on_every_frame(size: tuple[int, int, int], share: float, top: float, left: float) -> None:
    num_frames, height, width = size
    places = torch.arange(height * width).reshape(1, 1, height, width).expand(num_frames, 3, -1, -1)
    cut = crop_frames(places, share, top, left)
    first = int(cut[0, 0, 0, 0])
    row, column = divmod(first, width)
    assert torch.equal(
        cut, places[..., row : row + cut.shape[-2], column : column + cut.shape[-1]]
    )  # rows and columns keep their order


def test_draws_of_neighbours_differ() -> None:
    frames, augment = noise(2, 32, 32), AugmentConfig(0.3, 0.3)
    drawn = [
        augment_frames(frames, augment, np.random.default_rng([0, epoch, index]))
        for epoch in range(3)
        for index in range(3)
    ]
    assert len({(tuple(one.shape), one.float().mean().item()) for one in drawn}) == 9


def test_colour_does_not_move_the_cut() -> None:
    frames = noise(2, 50, 50)
    cut = augment_frames(frames, AugmentConfig(crop=0.4), np.random.default_rng(5))
    both = augment_frames(frames, AugmentConfig(color=1e-9, crop=0.4), np.random.default_rng(5))
    assert torch.equal(cut, both)


def test_factors_of_one_change_nothing() -> None:
    frames = noise(3, 17, 19)
    assert torch.equal(recolor_frames(frames, 1.0, 1.0, 1.0), frames)


def test_each_factor_does_what_it_says() -> None:
    frames = (noise(2, 24, 32).float() * 0.3 + 90).to(torch.uint8)  # far from the ends, so that nothing is cut off
    luma = torch.tensor([0.299, 0.587, 0.114]).reshape(3, 1, 1)

    def gray(x: Tensor) -> Tensor:
        return (x.float() * luma).sum(1)

    torch.testing.assert_close(recolor_frames(frames, 1.2, 1, 1).float(), frames.float() * 1.2, atol=0.51, rtol=0)
    harder = recolor_frames(frames, 1, 1.3, 1)
    assert harder.float().std() / frames.float().std() == pytest.approx(1.3, rel=0.02)
    assert gray(harder).mean().item() == pytest.approx(gray(frames).mean().item(), abs=1.0)
    duller = recolor_frames(frames, 1, 1, 0.0)
    torch.testing.assert_close(gray(duller), gray(frames), atol=1.0, rtol=0)
    assert (duller.float().amax(1) - duller.float().amin(1)).max() <= 1
    one = augment_frames(frames, AugmentConfig(color=0.5), np.random.default_rng(3))
    ratio = one.float().mean((1, 2, 3)) / frames.float().mean((1, 2, 3))
    assert ratio[0].item() == pytest.approx(ratio[1].item(), rel=0.02)  # one change for all frames


@pytest.mark.parametrize(
    "values", [{"color": -0.1}, {"color": 0.6}, {"crop": 0.51}, {"crop": float("nan")}, {"jitter": 0.6}]
)
def test_values_outside_their_range_are_refused(values: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"must be 0 to 0\.5"):
        AugmentConfig(**values)
