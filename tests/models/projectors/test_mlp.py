"""Position-wise projectors against the reference classes that have the same weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from vlmcap.models.projectors import ProjectorSpec, build_projector

Make = Callable[..., ProjectorSpec]

DV, DL = 6, 8


@pytest.mark.parametrize("kind", ["linear", "mlp"])
@pytest.mark.parametrize("use_layer_norm", [False, True])
def test_layers(kind: str, use_layer_norm: bool, spec_of: Make) -> None:
    projection = build_projector(spec_of(kind, depth=4, use_layer_norm=use_layer_norm)).projection
    sizes = [(layer.in_features, layer.out_features) for layer in projection.modules() if isinstance(layer, nn.Linear)]
    assert sizes == ([(DV, DL)] if kind == "linear" else [(DV, DL)] + [(DL, DL)] * 3)
    assert [m.normalized_shape for m in projection.modules() if isinstance(m, nn.LayerNorm)] == ([(DV,)] if use_layer_norm else [])


def test_layer_norm_gives_features_a_common_scale(spec_of: Make) -> None:
    projector = build_projector(spec_of(use_layer_norm=True))
    features = torch.randn(1, 4, 16, DV)
    torch.testing.assert_close(projector(features * 1000), projector(features), atol=1e-3, rtol=1e-3)


def test_two_layers_are_llava_next_videos_projector(spec_of: Make, record_property: Callable[[str, object], None]) -> None:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextVideoConfig
    from transformers.models.llava_next_video.modeling_llava_next_video import LlavaNextVideoMultiModalProjector

    text: Any = LlamaConfig(hidden_size=DL, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=9)
    vision: Any = CLIPVisionConfig(hidden_size=DV, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    theirs = LlavaNextVideoMultiModalProjector(LlavaNextVideoConfig(vision_config=vision, text_config=text))
    ours = build_projector(spec_of())
    names = {"linear_1": "projection.layers.0", "linear_2": "projection.layers.2"}
    ours.load_state_dict({f"{names[k.split('.')[0]]}.{k.split('.')[1]}": v for k, v in theirs.state_dict().items()})
    features = torch.randn(2, 4, 16, DV)
    expected = theirs(features).flatten(1, 2)
    record_property("parity:projector:mlp", (ours(features) - expected).abs().max().item())
    torch.testing.assert_close(ours(features), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("side", [4, 6])
def test_pixel_shuffle_is_internvls(side: int, spec_of: Make, record_property: Callable[[str, object], None]) -> None:
    from transformers import InternVLConfig, InternVLModel, InternVLVisionConfig, Qwen2Config
    from transformers.models.internvl.modeling_internvl import InternVLMultiModalProjector

    vision: Any = InternVLVisionConfig(hidden_size=DV)
    theirs = InternVLMultiModalProjector(InternVLConfig(vision_config=vision, text_config=Qwen2Config(hidden_size=DL)))  # type: ignore[arg-type]
    with torch.no_grad():
        for weight in theirs.layer_norm.parameters():
            weight.normal_()
    ours = build_projector(spec_of("pixel_shuffle", grid=(side, side)))
    names = {"layer_norm": "projection.norm", "linear_1": "projection.layers.0", "linear_2": "projection.layers.2"}
    ours.load_state_dict({f"{names[k.split('.')[0]]}.{k.split('.')[1]}": v for k, v in theirs.state_dict().items()})
    features = torch.randn(2, 4, side**2, DV)
    shuffled = InternVLModel.pixel_shuffle(None, features.reshape(8, side, side, DV), scale_factor=0.5)  # type: ignore[arg-type]
    expected = theirs(shuffled.reshape(2, 4 * (side // 2) ** 2, 4 * DV))
    record_property("parity:projector:pixel_shuffle", (ours(features) - expected).abs().max().item())
    torch.testing.assert_close(ours(features), expected, atol=1e-6, rtol=1e-6)


def test_pixel_shuffle_joins_neighbours_of_an_oblong_grid(spec_of: Make) -> None:
    from vlmcap.models.projectors.pixel_shuffle import shuffle_patches

    places = torch.arange(24).reshape(1, 1, 24, 1)  # 4 rows of 6
    joined = shuffle_patches(places, (4, 6), 2)[0, 0]
    assert joined.tolist() == [[6 * r + c, 6 * r + c + 1, 6 * r + 6 + c, 6 * r + 7 + c] for r in (0, 2) for c in (0, 2, 4)]
