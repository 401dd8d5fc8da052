"""Encoders from a configuration only: sizes, parameter counts and impossible options."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.checkpoints.encoders import Checkpoint
from vlmcap.errors import UserError
from vlmcap.models.encoders import EncoderOptions, FrameTransform, VisionEncoder, build_encoder

LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
SO400M = {"hidden_size": 1152, "num_hidden_layers": 27, "num_attention_heads": 16, "intermediate_size": 4304}
DINOV3 = {"model_type": "dinov3_vit", "num_register_tokens": 4}
GATED = DINOV3 | {"use_gated_mlp": True}
INTERN = {"model_type": "internvl_vision", "image_size": [448, 448], "patch_size": [14, 14]}

# The published models: configuration, millions of parameters as published, their tolerance, patches a frame.
PUBLISHED: list[tuple[str, dict[str, Any], float, float, int]] = [
    ("clip", LARGE | {"model_type": "clip_vision_model", "image_size": 336, "patch_size": 14}, 303.5, 0.1, 576),
    ("siglip", SO400M | {"model_type": "siglip_vision_model", "image_size": 384, "patch_size": 14}, 428.2, 0.1, 729),
    ("dinov3", LARGE | DINOV3, 303.1, 0.1, 196),
    (
        "dinov3",
        GATED | {"hidden_size": 1280, "num_hidden_layers": 32, "num_attention_heads": 20, "intermediate_size": 5120},
        840.6,
        0.1,
        196,
    ),
    (
        "dinov3",
        GATED
        | {"hidden_size": 4096, "num_hidden_layers": 40, "num_attention_heads": 32, "intermediate_size": 8192}
        | {"query_bias": False, "value_bias": False},
        6716,
        1,
        196,
    ),
    ("internvit", LARGE | INTERN | {"attention_bias": True}, 304.0, 0.1, 1024),
    (
        "internvit",
        INTERN
        | {"hidden_size": 3200, "num_hidden_layers": 45, "num_attention_heads": 25, "intermediate_size": 12800}
        | {"use_qk_norm": True, "norm_type": "rms_norm"},
        5536,
        1,
        1024,
    ),
]


def build(config: Any, layer: int = -1, **options: Any) -> VisionEncoder:
    with torch.device("meta"):
        return build_encoder(config, EncoderOptions(layer, torch.bfloat16, **options))


def count(module: nn.Module) -> float:
    return sum(parameter.numel() for parameter in module.parameters()) / 1e6


@pytest.mark.parametrize(("family", "config", "millions", "tolerance", "patches"), PUBLISHED)
def test_true_sizes(family: str, config: dict[str, Any], millions: float, tolerance: float, patches: int) -> None:
    encoder = build(config)
    assert all(tensor.is_meta for tensor in [*encoder.parameters(), *encoder.buffers()])
    not_built = 0.0
    if family == "siglip":
        from transformers import SiglipVisionConfig, SiglipVisionModel

        with torch.device("meta"):
            not_built = count(SiglipVisionModel(SiglipVisionConfig(**config)).head)
        assert not_built > 15
    assert count(encoder) + not_built == pytest.approx(millions, abs=tolerance)
    assert encoder.num_patches == patches
    assert encoder.embed_dim == config["hidden_size"]
    with torch.device("meta"):
        features = encoder(torch.zeros(1, 2, 3, *(2 * [encoder.transform.image_size]), dtype=torch.uint8))  # type: ignore[union-attr]
    assert features.shape == (1, 2, patches, config["hidden_size"])


def test_a_layer_before_the_last_costs_a_block_less() -> None:
    config = LARGE | {"model_type": "clip_vision_model", "image_size": 336, "patch_size": 14}
    assert count(build(config)) - count(build(config, -2)) == pytest.approx(12.6, abs=0.1)


def test_naflex_at_its_true_size() -> None:
    config = {
        "model_type": "siglip2",
        "vision_config": SO400M | {"model_type": "siglip2_vision_model", "patch_size": 16, "num_patches": 256},
    }
    encoder = build(config, max_patches=512)
    assert encoder.num_patches == 512
    with torch.device("meta"):
        features = encoder(torch.zeros(2, 3, 512, 768, dtype=torch.uint8), [(3, 16, 28), (2, 16, 32)])
    assert features.shape == (2, 3, 512, 1152)


def test_a_configuration_gives_what_its_checkpoint_gives(checkpoint: Checkpoint) -> None:
    loaded, options = checkpoint.load(-2), EncoderOptions(-2, torch.float32)
    for config in (
        checkpoint.model.config,
        checkpoint.model.config.to_dict(),
        {"vision_config": checkpoint.model.config.to_dict()},
    ):
        built = build_encoder(config, options, processor=checkpoint.processor.to_dict())
        assert {n: t.shape for n, t in built.state_dict().items()} == {
            n: t.shape for n, t in loaded.state_dict().items()
        }
        assert built.transform == loaded.transform
        assert torch.equal(built.mean, loaded.mean)
        assert (built.grid, built.num_patches, built.embed_dim) == (loaded.grid, loaded.num_patches, loaded.embed_dim)
        assert not any(parameter.requires_grad for parameter in built.parameters())


def test_building_leaves_the_configuration_as_it_was(checkpoint: Checkpoint) -> None:
    build_encoder(checkpoint.model.config, EncoderOptions(0, torch.float32))
    assert checkpoint.model.config.num_hidden_layers == 3


@pytest.mark.parametrize(
    ("family", "native"), [("clip", True), ("siglip", False), ("dinov3", False), ("internvit", False)]
)
def test_without_a_processor_the_family_decides(checkpoints: dict[str, Checkpoint], family: str, native: bool) -> None:
    encoder = build_encoder(checkpoints[family].model.config, EncoderOptions(-1, torch.float32))
    assert isinstance(encoder.transform, FrameTransform)
    assert encoder.transform.is_cropped == native
    assert encoder.transform.resampling == {"dinov3": "bilinear"}.get(family, "bicubic")


@pytest.mark.parametrize("layer", [4, -5])
def test_a_layer_that_is_not_there(checkpoint: Checkpoint, layer: int) -> None:
    with pytest.raises(UserError, match=r"encoder\.feature_layer must be in -4…3"):
        checkpoint.load(layer)


@pytest.mark.parametrize(
    ("family", "size", "message"),
    [
        (
            "dinov3",
            100,
            r"encoder\.image_size=100 is not a multiple of the patch size of 16 pixels; set it to 96 or 112",
        ),
        (
            "internvit",
            60,
            r"encoder\.image_size=60 is not a multiple of the patch size of 14 pixels; set it to 56 or 70",
        ),
        ("clip", 13, r"encoder\.image_size=13 is less than one patch; the smallest possible is 14"),
        ("siglip", 0, r"encoder\.image_size=0 is less than one patch"),
        ("dinov3", -16, r"encoder\.image_size=-16 is less than one patch"),
    ],
)
def test_sizes_that_cannot_be(checkpoints: dict[str, Checkpoint], family: str, size: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        checkpoints[family].load(image_size=size)


@pytest.mark.parametrize(
    ("options", "key"), [({"max_patches": 0}, "encoder.max_patches"), ({"max_tiles": 0}, "encoder.tiling")]
)
def test_budgets_that_cannot_be(options: dict[str, Any], key: str) -> None:
    with pytest.raises(UserError, match=f"{key} must be at least 1, not 0"):
        EncoderOptions(-1, torch.float32, **options)
