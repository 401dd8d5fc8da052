"""Patch features match the transformers classes for the same pixel values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.checkpoints.encoders import Checkpoint, hidden_state
from vlmcap.models.encoders import VisionEncoder


def frames_of(size: int, batch: int = 2, frames: int = 3) -> Tensor:
    return torch.randint(
        0, 256, (batch, frames, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )


def pixels_of(checkpoint: Checkpoint, frames: Tensor) -> Tensor:
    mean, std = (
        torch.tensor(values).view(3, 1, 1)
        for values in (checkpoint.processor.image_mean, checkpoint.processor.image_std)
    )
    return (frames.flatten(0, 1) / 255 - mean) / std


def size_of(encoder: VisionEncoder) -> int:
    return int(encoder.transform.image_size)  # type: ignore[union-attr]


def arguments_for(checkpoint: Checkpoint) -> dict[str, Any]:
    return {"interpolate_pos_encoding": True} if checkpoint.family in ("clip", "siglip") else {}


@pytest.mark.parametrize("layer", [-1, -2, -4, 0, 1, 3])
@torch.no_grad()
def test_features_are_the_hidden_states_of_the_class(
    checkpoint: Checkpoint, layer: int, record_property: Callable[[str, object], None]
) -> None:
    encoder = checkpoint.load(layer)
    frames = frames_of(size_of(encoder))
    features = encoder(frames)
    assert encoder.grid == (4, 4)
    assert features.shape == (2, 3, encoder.num_patches, encoder.embed_dim) == (2, 3, 16, 32)
    expected = hidden_state(checkpoint, pixels_of(checkpoint, frames), layer)
    record_property(
        f"parity:encoder:{checkpoint.model.config.model_type}", (features.flatten(0, 1) - expected).abs().max().item()
    )
    torch.testing.assert_close(features.flatten(0, 1), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_layers_differ(checkpoint: Checkpoint) -> None:
    """In families with a final norm, -1 is the norm of the raw state 3."""
    frames = frames_of(size_of(checkpoint.load()), 1, 1)
    first, last, before, raw = (checkpoint.load(layer)(frames) for layer in (0, -1, -2, 3))
    assert not torch.allclose(last, before, atol=1e-2)
    assert not torch.allclose(first, before, atol=1e-2)
    assert torch.equal(last, raw) == (checkpoint.family in ("clip", "siglip"))


@pytest.mark.parametrize("layer", [0, -3, -2, -1])
def test_blocks_behind_the_layer_are_not_there(checkpoint: Checkpoint, layer: int) -> None:
    blocks = {
        name.split(".layer")[1].split(".")[1]
        for name in checkpoint.load(layer).state_dict()
        if ".layers." in name or ".layer." in name
    }
    assert blocks == {str(index) for index in range(layer if layer >= 0 else 4 + layer)}


@pytest.mark.parametrize("size", [2, 3, 5, 6])
@torch.no_grad()
def test_another_image_size(checkpoint: Checkpoint, size: int) -> None:
    patch = size_of(checkpoint.load()) // 4
    encoder = checkpoint.load(-2, image_size=size * patch)
    frames = frames_of(size * patch, 1, 2)
    features = encoder(frames)
    assert encoder.grid == (size, size)
    assert features.shape == (1, 2, size * size, 32)
    expected = hidden_state(checkpoint, pixels_of(checkpoint, frames), -2, **arguments_for(checkpoint))
    torch.testing.assert_close(features[0], expected, atol=1e-5, rtol=1e-5)
    assert encoder.transform(torch.zeros(2, 3, 90, 160, dtype=torch.uint8)).shape[-2:] == frames.shape[-2:]


@pytest.mark.parametrize("family", ["clip", "siglip"])
@torch.no_grad()
def test_pixels_beyond_the_last_whole_patch_are_dropped(checkpoints: dict[str, Checkpoint], family: str) -> None:
    """As in SigLIP 2: 384 pixels give 27 patches of 14."""
    checkpoint, frames = checkpoints[family], frames_of(80, 1, 1)
    encoder = checkpoint.load(image_size=80)
    expected = hidden_state(checkpoint, pixels_of(checkpoint, frames), -1, interpolate_pos_encoding=True)
    assert encoder.grid == (5, 5)
    torch.testing.assert_close(encoder(frames)[0], expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_patches_are_in_row_major_order(checkpoint: Checkpoint) -> None:
    """Layer 0 is before any attention, so a change in row 1, column 2 reaches only patch 6 of 16."""
    encoder = checkpoint.load(0)
    size = size_of(encoder)
    frames = frames_of(size, 1, 1)
    changed, patch = frames.clone(), size // 4
    changed[..., patch : 2 * patch, 2 * patch : 3 * patch] = (
        255 - changed[..., patch : 2 * patch, 2 * patch : 3 * patch]
    )
    difference = (encoder(frames) - encoder(changed)).abs().amax(-1).flatten()
    assert difference.nonzero().flatten().tolist() == [6]


@torch.no_grad()
def test_frames_do_not_mix(checkpoint: Checkpoint) -> None:
    encoder = checkpoint.load()
    frames = frames_of(size_of(encoder))
    torch.testing.assert_close(encoder(frames)[1, 2], encoder(frames[1:, 2:])[0, 0], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_frames_behind_a_clips_last_are_not_computed(checkpoint: Checkpoint) -> None:
    encoder, seen = checkpoint.load(), []
    encoder.tower.register_forward_pre_hook(
        lambda _module, _args, kwargs: seen.append(len(kwargs["pixel_values"])), with_kwargs=True
    )
    frames = frames_of(size_of(encoder))
    whole, padded = encoder(frames), encoder(frames, [(1, 4, 4), (3, 4, 4)])
    assert seen == [6, 4]
    torch.testing.assert_close(padded[0, :1], whole[0, :1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(padded[1], whole[1], atol=1e-5, rtol=1e-5)
    assert not padded[0, 1:].any()


def test_loaded_encoders_are_frozen_and_can_be_trained(checkpoint: Checkpoint) -> None:
    encoder = checkpoint.load(-2)
    assert not encoder.training
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    encoder.requires_grad_(True)
    frames = frames_of(size_of(encoder))
    encoder(frames, [(2, 4, 4), (3, 4, 4)]).square().mean().backward()
    silent = {name for name, parameter in encoder.named_parameters() if parameter.grad is None}
    assert silent <= {"tower.embeddings.mask_token"}


def test_gradient_checkpointing_runs_blocks_twice_and_changes_no_gradient(checkpoint: Checkpoint) -> None:
    gradients: list[list[Tensor]] = []
    for is_checkpointed in (False, True):
        encoder: Any = checkpoint.load(-2).requires_grad_(True).train()
        if is_checkpointed:
            encoder.tower.activation_checkpointing_enable()
        calls: list[str] = []
        block = next(module for module in encoder.tower.modules() if type(module).__name__.endswith("Layer"))
        next(block.children()).register_forward_pre_hook(lambda *_, calls=calls: calls.append("call"))
        torch.manual_seed(0)  # DINOv3's positions are jittered in training
        encoder(frames_of(size_of(encoder), 1, 2)).square().mean().backward()
        assert len(calls) == 1 + is_checkpointed
        gradients.append([parameter.grad for parameter in encoder.parameters() if parameter.grad is not None])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed, atol=1e-6, rtol=1e-4)


@torch.no_grad()
def test_attention_and_dtype_reach_the_tower(checkpoint: Checkpoint) -> None:
    encoder: Any = checkpoint.load(attention="eager", dtype=torch.bfloat16, image_size=2 * size_of(checkpoint.load()))
    assert encoder.tower.config._attn_implementation == "eager"
    assert {parameter.dtype for parameter in encoder.parameters()} == {torch.bfloat16}
    frames = frames_of(size_of(encoder), 1, 1)
    features = encoder(frames)
    assert features.dtype == torch.bfloat16
    expected = hidden_state(checkpoint, pixels_of(checkpoint, frames), -1, **arguments_for(checkpoint))
    assert torch.cosine_similarity(features[0].float(), expected, dim=-1).min() > 0.99
