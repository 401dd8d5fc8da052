"""Frames of a scene: the same for a seed, and a single one does not tell the direction."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from vlmcap.demo import render as rendering
from vlmcap.demo.grammar import FACTS, Scene
from vlmcap.demo.render import NUM_FRAMES, SIZE, render

SCENE = Scene("들판", "한낮", "흐림", "드론", "빨간", "오른쪽", "고정")


@pytest.mark.parametrize("name", FACTS["object"])
def test_objects_are_their_own_mirror_images(name: str) -> None:
    v, u = np.mgrid[-1.5:1.5:61j, -1.5:1.5:61j].astype(np.float32)
    u = (u - u[:, ::-1]) / 2  # exactly odd
    layers = rendering._object_layers(name, u, v)
    assert any(colour is None for _, colour in layers), "a part has the colour that the caption names"
    for mask, _ in layers:
        assert mask.any()
        assert np.array_equal(mask, mask[:, ::-1])


def test_a_scene_is_rendered_the_same_for_a_seed_only() -> None:
    frames = render(SCENE, 3)
    assert (frames.shape, frames.dtype) == ((NUM_FRAMES, SIZE, SIZE, 3), np.uint8)
    assert np.array_equal(frames, render(SCENE, 3))
    assert not np.array_equal(frames, render(SCENE, 4))


def test_the_direction_turns_the_path_around_and_changes_nothing_else() -> None:
    frames = render(SCENE, 5).astype(int)
    turned = render(replace(SCENE, direction="왼쪽"), 5).astype(int)
    assert not np.array_equal(frames, turned)
    forward, backward = object_centres(frames), object_centres(turned)
    assert all(later > earlier for earlier, later in pairwise(forward))
    assert all(later < earlier for earlier, later in pairwise(backward))
    assert forward == pytest.approx(backward[::-1], abs=1.0), "the same places, in the other order"


def object_centres(frames: np.ndarray[tuple[int, ...], np.dtype[np.int_]]) -> list[float]:
    """Mean column of strongly red pixels of each frame."""
    is_red = (frames[..., 0] > 180) & (frames[..., 1] < 80) & (frames[..., 2] < 80)
    return [float(np.nonzero(frame)[1].mean()) for frame in is_red]


@pytest.mark.parametrize("fact", ["place", "time", "weather", "object", "colour", "camera"])
def test_every_value_of_a_fact_looks_different(fact: str) -> None:
    clips = [render(replace(SCENE, **{fact: value}), 7).astype(int) for value in FACTS[fact]]
    for index, clip in enumerate(clips):
        for other in clips[:index]:
            assert (np.abs(clip - other).max(axis=-1) > 24).mean() > 0.004
