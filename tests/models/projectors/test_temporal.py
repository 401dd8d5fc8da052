"""Temporal layers attend to the right tokens, depend on order, and match dense attention with a mask."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from vlmcap.config import ProjectorConfig
from vlmcap.models.projectors import ProjectorSizes, build_projector
from vlmcap.models.projectors.base import join_heads, split_heads
from vlmcap.models.projectors.temporal import LocalGlobalAttention, _block_mask, rotate, windowed_attention

Make = Callable[..., tuple[ProjectorConfig, ProjectorSizes]]

DV, DL, FRAMES = 6, 8, 4


def test_temporal_attention_looks_along_time_at_its_own_place_only(spec_of: Make) -> None:
    projector = build_projector(*spec_of("linear", grid=(1, 3), temporal="attention"))
    features = torch.randn(1, FRAMES, 3, DV)
    changed = features.clone()
    changed[0, 0, 1] += 1
    moved = (projector(features) - projector(changed)).abs().amax(-1).reshape(FRAMES, 3)
    assert bool((moved[:, 1] > 0).all())
    assert moved[:, [0, 2]].max() == 0


@pytest.mark.parametrize(
    ("temporal", "is_bag"), [("none", True), ("position", False), ("attention", False), ("local_global", False)]
)
def test_frame_order_matters_with_temporal_modelling(temporal: str, is_bag: bool, spec_of: Make) -> None:
    """Bags of frames cannot tell left from right."""
    projector = build_projector(*spec_of(temporal=temporal, window=20))
    features = torch.randn(1, FRAMES, 16, DV)
    tokens = projector(features).reshape(FRAMES, 16, DL)
    reversed_tokens = projector(features.flip(1)).reshape(FRAMES, 16, DL).flip(0)
    assert torch.allclose(tokens, reversed_tokens, atol=1e-6) == is_bag


def test_attention_has_the_inner_width(spec_of: Make) -> None:
    for hidden_dim, expected in ((None, 8), (32, 32)):  # 6, rounded up to two even heads
        after: Any = build_projector(*spec_of(temporal="attention", hidden_dim=hidden_dim)).after
        assert after.qkv.weight.shape == (3 * expected, DL)
        assert after.out.weight.shape == (DL, expected)


def test_places_of_another_grid_are_interpolated(spec_of: Make) -> None:
    projector = build_projector(*spec_of(temporal="position"))
    before: Any = projector.before
    features = torch.randn(1, 2, 8 * 6, DV)
    place = before.position.patch.transpose(1, 2).unflatten(2, (4, 4))
    places = F.interpolate(place, (8, 6), mode="bilinear").flatten(2).transpose(1, 2)
    expected = before.norm(features) + before.position.frame[:2] + places
    torch.testing.assert_close(before(features, (8, 6)), expected, atol=1e-6, rtol=1e-5)


def dense(query: Tensor, key: Tensor, value: Tensor, global_key: Tensor, global_value: Tensor, window: int) -> Tensor:
    """Computes the same attention with a mask over all pairs."""
    places = torch.arange(query.shape[2])
    is_near = (places[:, None] - places).abs() <= window
    mask = F.pad(is_near, (global_key.shape[2], 0), value=True)
    keys, values = torch.cat([global_key, key], dim=2), torch.cat([global_value, value], dim=2)
    return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask)


@pytest.mark.parametrize("num_global", [0, 1, 3])
@pytest.mark.parametrize(("length", "window"), [(1, 4), (7, 100), (8, 4), (9, 4), (13, 1), (50, 7), (64, 16)])
def test_blocks_are_dense_attention_with_the_mask(length: int, window: int, num_global: int) -> None:
    generator = torch.Generator().manual_seed(length)
    parts = [torch.randn(2, 3, length, 4, generator=generator, requires_grad=True) for _ in range(3)]
    parts += [torch.randn(2, 3, num_global, 4, generator=generator, requires_grad=True) for _ in range(2)]
    ours, theirs = windowed_attention(*parts, window), dense(*parts, window)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    weights = torch.randn(ours.shape, generator=generator)
    gradients = torch.autograd.grad((ours * weights).sum(), parts)
    for our_gradient, gradient in zip(gradients, torch.autograd.grad((theirs * weights).sum(), parts), strict=True):
        torch.testing.assert_close(our_gradient, gradient, atol=1e-5, rtol=1e-4)


def test_rows_of_padding_have_something_to_look_at() -> None:
    """Some kernels return NaN for fully masked rows, and NaN · 0 in the gradient of every key."""
    for length, window in ((9, 4), (5, 4), (3, 7), (2, 1)):
        assert bool(_block_mask(length, min(length, window), window, 0, torch.device("cpu")).any(-1).all())


def test_the_whole_part_is_dense_attention_with_the_mask() -> None:
    torch.manual_seed(0)
    part = LocalGlobalAttention(8, hidden_dim=12, num_heads=2, window=5, num_global=3)
    tokens = torch.randn(2, 3, 7, 8)
    query, key, value = (split_heads(each, 2) for each in part.qkv(part.norm(tokens.flatten(1, 2))).chunk(3, dim=-1))
    readers = split_heads(part.global_query, 2)
    read = torch.softmax(readers @ key.transpose(2, 3) / 6**0.5, dim=-1) @ value  # the global tokens look at all 21
    global_key, global_value = (
        split_heads(each, 2) for each in part.global_key_value(part.global_query + join_heads(read)).chunk(2, -1)
    )
    mixed = dense(rotate(query), rotate(key), value, global_key, global_value, 5)
    torch.testing.assert_close(
        part(tokens, (1, 7)), tokens + part.out(join_heads(mixed)).view_as(tokens), atol=1e-6, rtol=1e-5
    )


def test_rotation_is_that_of_llama() -> None:
    from transformers.models.llama.modeling_llama import rotate_half

    heads = torch.randn(1, 2, 9, 6)
    angles = torch.outer(torch.arange(9.0), 10000.0 ** (-torch.arange(0, 6, 2) / 6)).repeat(1, 2)
    torch.testing.assert_close(rotate(heads), heads * angles.cos() + rotate_half(heads) * angles.sin())


@pytest.mark.parametrize(("num_global", "is_far"), [(0, False), (2, True)])
def test_far_tokens_are_heard_through_global_ones_only(num_global: int, is_far: bool) -> None:
    torch.manual_seed(0)
    part = LocalGlobalAttention(8, hidden_dim=8, num_heads=2, window=3, num_global=num_global)
    tokens = torch.randn(1, 1, 20, 8)
    changed = tokens.clone()
    changed[0, 0, 0] = torch.randn(8)
    moved = (part(tokens, (1, 20)) - part(changed, (1, 20))).abs().amax(-1)[0, 0] > 1e-7
    assert bool(moved[:4].all())
    assert bool(moved[4:].any()) == is_far


def test_work_and_saved_memory_grow_with_the_length_not_its_square(spec_of: Make) -> None:
    part: Any = build_projector(*spec_of(temporal="local_global", window=16)).after
    flops, saved = [], []
    for length in (512, 1024, 2048):
        sizes: dict[int, int] = {}

        def keep(tensor: Tensor, sizes: dict[int, int] = sizes) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with (
            FlopCounterMode(display=False) as counter,
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        ):
            part(torch.randn(1, 1, length, 8), (1, length))
        flops.append(counter.get_total_flops())
        saved.append(sum(sizes.values()))
    for measured in (flops, saved):
        assert measured[1] / measured[0] == pytest.approx(2, rel=0.05)
        assert measured[2] / measured[1] == pytest.approx(2, rel=0.05)
