"""Every projector computes in float32, returns tokens in frame order, and treats clips independently."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from vlmcap.config import ProjectorConfig
from vlmcap.models.projectors import ProjectorSizes, build_projector

Make = Callable[..., tuple[ProjectorConfig, ProjectorSizes]]

DV, DL, FRAMES = 6, 8, 4
COMBINATIONS: list[dict[str, Any]] = [
    {"kind": "linear"},
    {"kind": "mlp", "use_layer_norm": True, "reducer": "resample"},
    {"kind": "mlp", "temporal": "position", "reducer": "merge"},
    {"kind": "mlp", "temporal": "attention", "frame_stack": 2},
    {"kind": "mlp", "temporal": "local_global", "reducer": "pool"},
    {"kind": "cross_attention", "temporal": "attention"},
    {"kind": "cross_attention", "reducer": "saliency", "temporal": "position"},
    {"kind": "cross_attention", "queries": "prompt"},
    {"kind": "perceiver", "reducer": "saliency"},
    {"kind": "c_abstractor", "temporal": "local_global"},
    {"kind": "pixel_shuffle", "temporal": "position"},
]


def inputs(batch: int = 1, grid: tuple[int, int] = (4, 4)) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, FRAMES, grid[0] * grid[1], DV, generator=generator), torch.randn(
        5, DL, generator=generator
    )


@pytest.mark.parametrize("options", COMBINATIONS)
def test_clips_of_a_batch_do_not_see_each_other(options: dict[str, Any], spec_of: Make) -> None:
    projector = build_projector(*spec_of(**options))
    features, prompt = inputs(3)
    alone = torch.cat([projector(clip[None], prompt=prompt) for clip in features])
    torch.testing.assert_close(projector(features, prompt=prompt), alone)


@pytest.mark.parametrize("options", COMBINATIONS)
def test_every_weight_learns(options: dict[str, Any], spec_of: Make) -> None:
    projector = build_projector(*spec_of(**options))
    features, prompt = inputs(2)
    projector(features, prompt=prompt).square().sum().backward()
    assert [
        name for name, weight in projector.named_parameters() if weight.grad is None or not weight.grad.isfinite().all()
    ] == []
    assert [name for name, weight in projector.named_parameters() if not weight.grad.any()] == []  # type: ignore[union-attr]


@pytest.mark.gpu
@pytest.mark.parametrize("options", COMBINATIONS)
def test_on_a_gpu_gradients_are_those_of_the_cpu_by_deterministic_kernels(
    options: dict[str, Any], spec_of: Make
) -> None:
    projector = build_projector(*spec_of(**options))
    features, prompt = inputs(2)
    weights = list(projector.parameters())
    expected = torch.autograd.grad(projector(features, prompt=prompt).square().sum(), weights)
    projector.cuda()
    torch.use_deterministic_algorithms(True)
    try:
        gradients = torch.autograd.grad(
            projector(features.cuda(), prompt=prompt.cuda()).square().sum(), list(projector.parameters())
        )
    finally:
        torch.use_deterministic_algorithms(False)
    for gradient, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient.cpu(), other, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("options", COMBINATIONS)
def test_half_precision_features_give_float32_tokens(options: dict[str, Any], spec_of: Make) -> None:
    projector = build_projector(*spec_of(**options))
    features, prompt = inputs()
    tokens = projector(features.half(), prompt=prompt.half())
    assert tokens.dtype == torch.float32
    torch.testing.assert_close(tokens, projector(features.half().float(), prompt=prompt.half().float()), atol=0, rtol=0)


@pytest.mark.parametrize("options", COMBINATIONS)
def test_float16_autocast_ends_at_the_edge(options: dict[str, Any], spec_of: Make) -> None:
    projector = build_projector(*spec_of(**options))
    features, prompt = inputs()
    exact = projector(features * 1e4, prompt=prompt)
    with torch.autocast("cpu", dtype=torch.float16):
        narrow = projector(features * 1e4, prompt=prompt)
        assert torch.ones(1, 1).matmul(torch.ones(1, 1)).dtype == torch.float16  # it goes on outside
    torch.testing.assert_close(narrow, exact, atol=0, rtol=0)


@pytest.mark.parametrize("temporal", ["none", "attention"])
def test_float16_autocast_does_not_overflow(temporal: str, spec_of: Make) -> None:
    projector = build_projector(*spec_of(temporal=temporal, depth=3, reducer="pool", frame_stack=2))
    with torch.no_grad():
        for module in projector.projection.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.mul_(20)
    features = (torch.rand(1, FRAMES, 16, DV) * 1e4 + 1e4).half()
    exact = projector(features)
    assert exact.abs().max() > torch.finfo(torch.float16).max  # or the test would show nothing
    with torch.autocast("cpu", dtype=torch.float16):
        torch.testing.assert_close(projector(features), exact)


@pytest.mark.parametrize("options", COMBINATIONS)
def test_bfloat16_autocast_gives_float32_tokens(options: dict[str, Any], spec_of: Make) -> None:
    projector = build_projector(*spec_of(**options))
    features, prompt = inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        tokens = projector(features, prompt=prompt)
    assert tokens.dtype == torch.float32
    torch.testing.assert_close(tokens, projector(features, prompt=prompt), atol=0.1, rtol=0.1)
    assert not torch.equal(tokens, projector(features, prompt=prompt))  # it was in use


def test_tokens_are_in_frame_order_then_patch_order(spec_of: Make) -> None:
    projector = build_projector(*spec_of("linear", grid=(1, 3)))
    features, _ = inputs(2, (1, 3))
    linear = projector.projection.layers[0]  # type: ignore[union-attr,index]
    expected = F.linear(features[1, 2, 1], linear.weight, linear.bias)
    torch.testing.assert_close(projector(features)[1, 2 * 3 + 1], expected)


@pytest.mark.parametrize("grid", [(4, 4), (2, 5), (6, 3)])
@pytest.mark.parametrize(
    "options",
    [
        {"temporal": "position"},
        {"temporal": "attention", "reducer": "pool"},
        {"kind": "c_abstractor", "temporal": "attention"},
        {"reducer": "resample", "temporal": "position"},
    ],
)
def test_clips_of_any_grid_and_length_go_through(grid: tuple[int, int], options: dict[str, Any], spec_of: Make) -> None:
    projector = build_projector(*spec_of(**options))
    features = inputs(1, grid)[0][:, :2]
    tokens = projector(features, grid=grid)
    assert tokens.shape == (1, projector.num_tokens(2, grid[0] * grid[1], grid), DL)
    assert bool(tokens.isfinite().all())


def test_patches_that_are_no_grid_are_caught(spec_of: Make) -> None:
    projector = build_projector(*spec_of())
    with pytest.raises(AssertionError, match=r"12 patches do not fill a grid of \(4, 4\)"):
        projector(inputs(1, (3, 4))[0])


def test_more_frames_than_were_announced_are_caught(spec_of: Make) -> None:
    projector = build_projector(*spec_of(temporal="position", num_frames=2))
    with pytest.raises(AssertionError, match="4 frames, at most 2"):
        projector(inputs()[0])


@pytest.mark.parametrize(
    ("options", "names"),
    [
        (
            {"temporal": "position"},
            ["before.norm.weight", "before.position.frame", "before.position.patch", "projection.layers.2.weight"],
        ),
        (
            {"temporal": "attention"},
            ["after.position.frame", "after.norm.weight", "after.qkv.weight", "after.out.bias"],
        ),
    ],
)
def test_names_in_checkpoints_stay(options: dict[str, Any], names: list[str], spec_of: Make) -> None:
    assert set(names) <= build_projector(*spec_of(**options)).state_dict().keys()
