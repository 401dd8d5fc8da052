"""Any vision tower of transformers as an encoder, against its class; what has no grid of patches is refused in a sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoints.encoders import IMAGENET, randomize
from vlmcap.models.encoders import EncoderOptions, VisionEncoder, load_encoder
from vlmcap.models.encoders.layout import as_tokens, tower_class

TINY = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}

# Type, its further settings, tokens in front of the patches.
TAKEN: list[tuple[str, dict[str, Any], int]] = [
    ("dinov2", {}, 1),
    ("dinov2_with_registers", {"num_register_tokens": 3}, 4),
    ("dinov3_vit", {"num_register_tokens": 2}, 3),
    ("aimv2_vision_model", {}, 0),
    ("radio", {"max_img_size": 64, "num_cls_tokens": 2, "num_registers": 3}, 5),
    ("mlcd_vision_model", {}, 1),
    ("metaclip_2_vision_model", {}, 1),
    ("tipsv2_vision_model", {}, 2),
    ("ijepa", {}, 0),
    ("vit", {}, 1),
    ("deit", {}, 2),
    ("vit_msn", {}, 1),
    ("beit", {"use_relative_position_bias": True}, 1),
    ("beit", {"use_shared_relative_position_bias": True}, 1),
    ("data2vec-vision", {}, 1),
    ("siglip_vision_model", {}, 0),
    ("clip_vision_model", {}, 1),
    ("pixio", {}, 8),
    ("idefics2_vision", {}, 0),
    ("blip_2_vision_model", {}, 1),
    ("janus_vision_model", {}, 0),
    ("vitdet", {}, 0),
]


def tiny_model(model_type: str, settings: dict[str, Any]) -> Any:
    from transformers import AutoConfig

    return randomize(tower_class(config := AutoConfig.for_model(model_type, **TINY | settings))(config), 1)


def save(model: Any, folder: Path) -> None:
    from transformers import SiglipImageProcessorPil

    model.save_pretrained(folder)
    SiglipImageProcessorPil(size={"height": 32, "width": 32}, **IMAGENET).save_pretrained(folder)


def frames_of(encoder: VisionEncoder) -> torch.Tensor:
    size = encoder.transform.image_size  # type: ignore[union-attr]
    return torch.randint(0, 256, (1, 2, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def expected(model: Any, encoder: VisionEncoder, frames: torch.Tensor, layer: int) -> torch.Tensor:
    """Patches of the class's own output: its last hidden state for -1, but SigLIP's before the norm."""
    outputs = model(pixel_values=(frames[0].float() - encoder.mean) / encoder.std, output_hidden_states=layer != -1 or is_siglip(model))
    hidden = outputs.last_hidden_state if layer == -1 and not is_siglip(model) else outputs.hidden_states[layer]
    return as_tokens(hidden)[:, encoder.num_prefix_tokens :]


def is_siglip(model: Any) -> bool:
    return bool(model.config.model_type == "siglip_vision_model")


@pytest.mark.parametrize(("model_type", "settings", "num_prefix_tokens"), TAKEN)
@torch.no_grad()
def test_features_are_those_of_the_class(model_type: str, settings: dict[str, Any], num_prefix_tokens: int, tmp_path: Path) -> None:
    model = tiny_model(model_type, settings)
    save(model, tmp_path)
    layers = (-1,) if model_type == "vitdet" else (-1, -2, 1, 0, 2)
    for layer in layers:
        encoder = load_encoder(tmp_path, EncoderOptions(layer, torch.float32))
        frames = frames_of(encoder)
        features = encoder(frames)
        assert encoder.num_prefix_tokens == num_prefix_tokens
        assert features.shape == (1, 2, 16, 32)
        torch.testing.assert_close(features[0], expected(model, encoder, frames, layer), atol=1e-6, rtol=1e-6)
