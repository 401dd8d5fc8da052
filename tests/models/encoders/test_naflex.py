"""SigLIP 2 NaFlex matches transformers' processor and model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.checkpoints.encoders import Checkpoint
from vlmcap.errors import UserError
from vlmcap.models.encoders import EncoderOptions, build_encoder

SIZES = [(90, 160), (160, 90), (56, 56), (41, 53), (30, 600), (720, 1280)]


def processed(naflex: Checkpoint, frames: Tensor) -> dict[str, Tensor]:
    output = naflex.processor([frame.permute(1, 2, 0).numpy() for frame in frames])
    return {
        key: torch.from_numpy(np.stack(output[key]))
        for key in ("pixel_values", "pixel_attention_mask", "spatial_shapes")
    }


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("layer", [-1, -2, 0])
@torch.no_grad()
def test_patches_and_features_are_those_of_processor_and_model(
    naflex: Checkpoint, film: Tensor, height: int, width: int, layer: int
) -> None:
    encoder, frames = naflex.load(layer, max_patches=24), film[:, :, :height, :width].contiguous()
    expected = processed(naflex, frames)
    patches, grid = encoder.transform(frames), encoder.transform.grid_thw(3, height, width)
    assert grid is not None
    count = grid[1] * grid[2]
    assert grid == (3, *expected["spatial_shapes"][0].tolist())
    assert (patches.dtype, patches.shape) == (torch.uint8, (3, 24, 48))
    assert not patches[:, count:].any()
    assert ((patches / 127.5 - 1)[:, :count] - expected["pixel_values"][:, :count]).abs().max() * 127.5 <= 2
    features = encoder(patches[None], [grid])[0]
    reference = naflex.model(**expected, output_hidden_states=True).hidden_states[layer]
    assert features.shape == (3, 24, 32)
    assert torch.cosine_similarity(features[:, :count], reference[:, :count], dim=-1).min() >= 0.999
    assert not features[:, count:].any()


@pytest.mark.parametrize("layer", [-1, -2, 0, 3])
@torch.no_grad()
def test_features_on_equal_pixels(
    naflex: Checkpoint, layer: int, record_property: Callable[[str, object], None]
) -> None:
    """Clips of three shapes in one batch, padded frames too."""
    encoder = naflex.load(layer)
    grids = [(2, 4, 6), (1, 2, 5), (3, 3, 3)]
    patches = torch.randint(0, 256, (3, 3, 24, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    features = encoder(patches, grids)
    for row, (frames, height, width) in enumerate(grids):
        count = height * width
        mask = torch.arange(24).lt(count).long().repeat(frames, 1)
        expected = naflex.model(
            pixel_values=patches[row, :frames] / 127.5 - 1,
            pixel_attention_mask=mask,
            spatial_shapes=torch.tensor([[height, width]] * frames),
            output_hidden_states=True,
        ).hidden_states[layer]
        record_property(
            "parity:encoder:siglip2_vision_model",
            (features[row, :frames, :count] - expected[:, :count]).abs().max().item(),
        )
        torch.testing.assert_close(features[row, :frames, :count], expected[:, :count], atol=1e-5, rtol=1e-5)
        assert not features[row, frames:].any()
        assert not features[row, :, count:].any()


def test_frames_of_one_shape_need_no_mask_and_no_padding(naflex: Checkpoint) -> None:
    """With a padding mask, attention cannot use its fast kernels."""
    encoder, seen = naflex.load(), []
    encoder.tower.register_forward_pre_hook(lambda _module, _args, kwargs: seen.append(kwargs), with_kwargs=True)
    features = encoder(torch.zeros(2, 2, 24, 48, dtype=torch.uint8), [(2, 3, 5), (2, 5, 3)])
    arguments: dict[str, Any] = seen[0]
    assert arguments["pixel_attention_mask"] is None
    assert arguments["pixel_values"].shape == (4, 15, 48)
    assert features.shape == (2, 2, 24, 32)


@torch.no_grad()
def test_padding_is_masked_in_every_attention(naflex: Checkpoint) -> None:
    patches = torch.randint(0, 256, (2, 2, 24, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    grids = [(2, 2, 3), (2, 4, 6)]
    plain, eager = naflex.load()(patches, grids), naflex.load(attention="eager")(patches, grids)
    torch.testing.assert_close(plain, eager, atol=1e-5, rtol=1e-5)
    half = naflex.load(dtype=torch.bfloat16)(patches, grids).float()
    assert torch.cosine_similarity(half[0, :, :6], plain[0, :, :6], dim=-1).min() > 0.99
    patches[0, :, 6:] = 99
    assert torch.equal(naflex.load()(patches, grids), plain)


def test_the_model_can_be_traced_without_values(naflex: Checkpoint) -> None:
    """The memory plan runs it with fake tensors."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with torch.device("meta"):
        encoder = build_encoder(naflex.model.config, EncoderOptions(-1, torch.float32, max_patches=24))
    with FakeTensorMode(allow_non_fake_inputs=True):
        features = encoder.to_empty(device="cpu")(torch.zeros(2, 3, 24, 48, dtype=torch.uint8), [(3, 4, 6), (2, 2, 5)])
    assert features.shape == (2, 3, 24, 32)


@pytest.mark.parametrize("budget", [24, 100, 256])
def test_every_grid_of_a_clip_is_possible(naflex: Checkpoint, budget: int) -> None:
    encoder = naflex.load(max_patches=budget)
    possible = set(encoder.possible_grids(2))
    sizes = np.random.default_rng(0).integers(16, 2000, (300, 2)).tolist()
    found = {encoder.transform.grid_thw(2, height, width) for height, width in sizes}
    assert found <= possible
    assert len(found) > 5
    assert max(height * width for _, height, width in possible) == budget == encoder.num_patches


def test_gradients_pass_padding(naflex: Checkpoint) -> None:
    encoder = naflex.load(-2).requires_grad_(True).train()
    encoder(torch.ones(2, 2, 24, 48, dtype=torch.uint8), [(2, 2, 3), (1, 4, 6)]).square().mean().backward()
    gradients = [parameter.grad for parameter in encoder.parameters()]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)


def test_the_pooling_head_is_not_built(naflex: Checkpoint) -> None:
    assert not any("head" in name for name in naflex.load().state_dict())


@pytest.mark.parametrize(
    ("options", "key"), [({"image_size": 56}, "encoder.image_size"), ({"max_tiles": 4}, "encoder.tiling")]
)
def test_options_of_fixed_sizes_are_refused(naflex: Checkpoint, options: dict[str, int], key: str) -> None:
    with pytest.raises(UserError, match=rf"{key} .*encoder\.max_patches"):
        naflex.load(**options)


def test_an_attention_that_the_class_lacks_becomes_sdpa(naflex: Checkpoint) -> None:
    encoder: Any = naflex.load(attention="flash_attention_2")
    assert encoder.tower.config._attn_implementation == "sdpa"
