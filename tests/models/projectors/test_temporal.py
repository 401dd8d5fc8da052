"""Temporal modelling: what it looks at, and that order matters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from vlmcap.models.projectors import ProjectorSpec, build_projector

Make = Callable[..., ProjectorSpec]

DV, DL, FRAMES = 6, 8, 4


def test_temporal_attention_looks_along_time_at_its_own_place_only(spec_of: Make) -> None:
    projector = build_projector(spec_of("linear", grid=(1, 3), temporal="attention"))
    features = torch.randn(1, FRAMES, 3, DV)
    changed = features.clone()
    changed[0, 0, 1] += 1
    moved = (projector(features) - projector(changed)).abs().amax(-1).reshape(FRAMES, 3)
    assert bool((moved[:, 1] > 0).all())
    assert moved[:, [0, 2]].max() == 0


@pytest.mark.parametrize(("temporal", "is_bag"), [("none", True), ("position", False), ("attention", False), ("local_global", False)])
def test_frame_order_matters_with_temporal_modelling(temporal: str, is_bag: bool, spec_of: Make) -> None:
    """Bags of frames cannot tell left from right."""
    projector = build_projector(spec_of(temporal=temporal, window=20))
    features = torch.randn(1, FRAMES, 16, DV)
    tokens = projector(features).reshape(FRAMES, 16, DL)
    reversed_tokens = projector(features.flip(1)).reshape(FRAMES, 16, DL).flip(0)
    assert torch.allclose(tokens, reversed_tokens, atol=1e-6) == is_bag


def test_attention_has_the_inner_width(spec_of: Make) -> None:
    for hidden_dim, expected in ((None, 8), (32, 32)):  # 6, rounded up to two even heads
        after: Any = build_projector(spec_of(temporal="attention", hidden_dim=hidden_dim)).after
        assert after.qkv.weight.shape == (3 * expected, DL)
        assert after.out.weight.shape == (DL, expected)


def test_places_of_another_grid_are_interpolated(spec_of: Make) -> None:
    projector = build_projector(spec_of(temporal="position"))
    before: Any = projector.before
    features = torch.randn(1, 2, 8 * 6, DV)
    place = before.position.place.transpose(1, 2).unflatten(2, (4, 4))
    places = F.interpolate(place, (8, 6), mode="bilinear").flatten(2).transpose(1, 2)
    expected = before.norm(features) + before.position.frame[:2] + places
    torch.testing.assert_close(before(features, (8, 6)), expected, atol=1e-6, rtol=1e-5)
