"""Projectors: stated sizes are the real ones, float32 throughout, tokens in frame order."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from vlmcap.models.projectors import Projector, build_projector
from vlmcap.models.projectors.reducers import FrameStack, PoolReducer

DV, DL, FRAMES = 6, 8, 4
GRIDS = {(27, 27): {1: 729, 2: 196, 3: 81}, (3, 5): {1: 15, 2: 6, 3: 2}, (4, 4): {1: 16, 2: 4, 3: 4}}


def build(kind: str = "mlp", grid: tuple[int, int] = (4, 4), **options: int | str) -> Projector:
    torch.manual_seed(0)
    return build_projector(kind, in_dim=DV, out_dim=DL, grid=grid, num_frames=FRAMES, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize(
    ("kind", "pool_size", "frame_stack", "temporal"),
    list(itertools.product(["linear", "mlp"], [1, 2, 3], [1, 2, 4], ["none", "position", "attention"])),
)
def test_the_stated_number_of_tokens_is_the_real_one(
    grid: tuple[int, int], kind: str, pool_size: int, frame_stack: int, temporal: str
) -> None:
    projector = build(kind, grid, pool_size=pool_size, frame_stack=frame_stack, temporal=temporal)
    num_patches = grid[0] * grid[1]
    tokens = projector(torch.randn(1, FRAMES, num_patches, DV))
    expected = FRAMES // frame_stack * GRIDS[grid][pool_size]
    assert projector.num_tokens(FRAMES, num_patches) == expected
    assert tokens.shape == (1, expected, DL)
    assert tokens.dtype == torch.float32
    assert bool(tokens.isfinite().all())


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_depth(kind: str) -> None:
    layers = [m for m in build(kind, depth=3).projection.modules() if isinstance(m, torch.nn.Linear)]
    assert [(layer.in_features, layer.out_features) for layer in layers] == (
        [(DV, DL)] if kind == "linear" else [(DV, DL)] + [(DL, DL)] * 2
    )


def test_tokens_are_in_frame_order_then_patch_order() -> None:
    projector = build("linear", (1, 3))
    features = torch.randn(2, FRAMES, 3, DV)
    linear = projector.projection.layers[0]  # type: ignore[union-attr,index]
    expected = F.linear(features[1, 2, 1], linear.weight, linear.bias)
    torch.testing.assert_close(projector(features)[1, 2 * 3 + 1], expected)


def test_frame_stack_joins_one_place_over_time() -> None:
    features = torch.arange(4 * 3 * 2).reshape(1, 4, 3, 2)  # (B, F, P, Dv)
    stacked = FrameStack(2)(features)
    assert stacked.shape == (1, 2, 3, 4)
    for stack, place in itertools.product(range(2), range(3)):
        assert stacked[0, stack, place].tolist() == [*features[0, 2 * stack, place].tolist(), *features[0, 2 * stack + 1, place].tolist()]


def test_pooling_averages_neighbours_and_what_is_there_at_an_odd_edge() -> None:
    features = torch.randn(1, 1, 9, 2)
    maps = features.reshape(3, 3, 2)
    expected = [maps[:2, :2].mean((0, 1)), maps[:2, 2].mean(0), maps[2, :2].mean(0), maps[2, 2]]
    torch.testing.assert_close(PoolReducer((3, 3), 2)(features)[0, 0], torch.stack(expected))


@pytest.mark.parametrize("temporal", ["none", "position", "attention"])
def test_half_precision_features_give_float32_tokens(temporal: str) -> None:
    projector = build(temporal=temporal, pool_size=2)
    features = torch.randn(1, FRAMES, 16, DV)
    torch.testing.assert_close(projector(features.half()), projector(features.half().float()), atol=0, rtol=0)


@pytest.mark.parametrize("temporal", ["none", "attention"])
def test_float16_autocast_does_not_overflow(temporal: str) -> None:
    projector = build(temporal=temporal, depth=3, pool_size=2, frame_stack=2)
    with torch.no_grad():
        for module in projector.projection.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.mul_(20)
    features = (torch.rand(1, FRAMES, 16, DV) * 1e4 + 1e4).half()
    exact = projector(features)
    assert exact.abs().max() > torch.finfo(torch.float16).max  # or the test would show nothing
    with torch.autocast("cpu", dtype=torch.float16):
        narrow = projector(features)
        assert torch.ones(1, 1).matmul(torch.ones(1, 1)).dtype == torch.float16  # it goes on outside
    assert narrow.dtype == torch.float32
    torch.testing.assert_close(narrow, exact)


def test_bfloat16_autocast_gives_float32_tokens() -> None:
    projector = build(temporal="attention")
    features = torch.randn(1, FRAMES, 16, DV)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        tokens = projector(features)
    assert tokens.dtype == torch.float32
    torch.testing.assert_close(tokens, projector(features), atol=0.1, rtol=0.1)


def test_temporal_attention_looks_along_time_at_its_own_place_only() -> None:
    projector = build("linear", (1, 3), temporal="attention")
    features = torch.randn(1, FRAMES, 3, DV)
    changed = features.clone()
    changed[0, 0, 1] += 1
    moved = (projector(features) - projector(changed)).abs().amax(-1).reshape(FRAMES, 3)
    assert bool((moved[:, 1] > 0).all())
    assert moved[:, [0, 2]].max() == 0


def test_frame_order_matters_with_temporal_position() -> None:
    """Bags of frames cannot tell left from right."""
    for temporal, is_bag in (("none", True), ("position", False), ("attention", False)):
        projector = build(temporal=temporal)
        features = torch.randn(1, FRAMES, 16, DV)
        tokens = projector(features).reshape(FRAMES, 16, DL)
        reversed_tokens = projector(features.flip(1)).reshape(FRAMES, 16, DL).flip(0)
        assert torch.allclose(tokens, reversed_tokens, atol=1e-6) == is_bag
