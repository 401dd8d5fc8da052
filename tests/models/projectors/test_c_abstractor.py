"""Honeybee's block from its formula, and that places stay in order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmcap.models.projectors import ProjectorSpec, build_projector

Make = Callable[..., ProjectorSpec]

DV, DL = 6, 8


def norm(maps: Tensor, layer: nn.LayerNorm) -> Tensor:
    mean, variance = maps.mean(1, keepdim=True), maps.var(1, keepdim=True, correction=0)
    return (maps - mean) / (variance + layer.eps).sqrt() * layer.weight[:, None, None] + layer.bias[:, None, None]


def block(maps: Tensor, layer: Any) -> Tensor:
    enter, norm_1, _, depthwise, norm_2, _, squeeze, leave, norm_3 = layer.branch
    inner = F.silu(norm(torch.einsum("oi,nihw->nohw", enter.weight[..., 0, 0], maps), norm_1))
    inner = F.silu(norm(F.conv2d(inner, depthwise.weight, padding=1, groups=inner.shape[1]), norm_2))
    reduce, _, expand, _ = squeeze.gate
    inner = inner * torch.sigmoid(expand(F.silu(reduce(inner.mean((2, 3))))))[..., None, None]
    inner = norm(torch.einsum("oi,nihw->nohw", leave.weight[..., 0, 0], inner), norm_3)
    if isinstance(layer.shortcut, nn.Sequential):
        maps = norm(torch.einsum("oi,nihw->nohw", layer.shortcut[0].weight[..., 0, 0], maps), layer.shortcut[1])
    return F.silu(inner + maps)


@pytest.mark.parametrize("hidden_dim", [None, 10])
def test_blocks_stand_around_an_adaptive_pooling(hidden_dim: int | None, spec_of: Make) -> None:
    projector = build_projector(spec_of("c_abstractor", grid=(5, 7), hidden_dim=hidden_dim, num_queries=9))
    with torch.no_grad():
        for module in projector.modules():
            if isinstance(module, nn.LayerNorm):
                module.weight.normal_()
                module.bias.normal_()
    projection: Any = projector.projection
    features = torch.randn(2, 4, 35, DV)
    maps = (features + projection.position).flatten(0, 1).transpose(1, 2).unflatten(2, (5, 7))
    for layer in projection.before:
        maps = block(maps, layer)
    maps = F.adaptive_avg_pool2d(maps, (3, 3))
    for layer in projection.after:
        maps = block(maps, layer)
    first, _, last = projection.readout
    expected = last(F.silu(first(maps.flatten(2).transpose(1, 2))))
    torch.testing.assert_close(projector(features), expected.reshape(2, 4 * 9, DL), atol=1e-5, rtol=1e-4)
    assert len(projection.before) == len(projection.after) == 2


def test_a_patch_moves_its_own_corner_most(spec_of: Make) -> None:
    """Tokens are row-major: a change in the last patch of the first row is the second of four tokens."""
    projector = build_projector(spec_of("c_abstractor", grid=(12, 12), num_layers=1))
    features = torch.randn(1, 1, 144, DV)
    changed = features.clone()
    changed[0, 0, 9:12] += 5
    moved = (projector(features) - projector(changed)).abs().sum(-1)[0]
    assert moved.argmax() == 1
