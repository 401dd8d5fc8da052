"""Any vision tower of transformers works as an encoder and matches its class.

What has no grid of patches is refused in a sentence.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.checkpoints.encoders import IMAGENET, randomize
from vlmcap.config import LoraConfig
from vlmcap.errors import UserError
from vlmcap.models.encoders import EncoderOptions, VisionEncoder, build_encoder, load_encoder
from vlmcap.models.encoders.classes import tower_class
from vlmcap.models.encoders.layout import as_tokens
from vlmcap.models.encoders.tower import add_tower_lora

TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}

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


RECORDED = ("dinov2_with_registers", "aimv2_vision_model", "radio")  # those with names


def tiny_model(model_type: str, settings: dict[str, Any]) -> Any:
    return tiny_model_of({"model_type": model_type, **TINY, **settings})


def tiny_model_of(values: dict[str, Any]) -> Any:
    from transformers import AutoConfig

    return randomize(tower_class(config := AutoConfig.for_model(**values))(config), 1)


def save(model: Any, folder: Path) -> None:
    from transformers import SiglipImageProcessorPil

    model.save_pretrained(folder)
    SiglipImageProcessorPil(size={"height": 32, "width": 32}, **IMAGENET).save_pretrained(folder)


def frames_of(encoder: VisionEncoder) -> torch.Tensor:
    size = encoder.transform.image_size  # type: ignore[union-attr]
    return torch.randint(0, 256, (1, 2, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def expected(model: Any, encoder: VisionEncoder, frames: torch.Tensor, layer: int) -> torch.Tensor:
    """Returns the patches of the class's output: the last hidden state for -1, but before the norm for SigLIP."""
    outputs = model(
        pixel_values=(frames[0].float() - encoder.mean) / encoder.std,
        output_hidden_states=layer != -1 or is_siglip(model),
    )
    hidden = outputs.last_hidden_state if layer == -1 and not is_siglip(model) else outputs.hidden_states[layer]
    return as_tokens(hidden)[:, encoder.num_prefix_tokens :]


def is_siglip(model: Any) -> bool:
    return bool(model.config.model_type == "siglip_vision_model")


@pytest.mark.parametrize(("model_type", "settings", "num_prefix_tokens"), TAKEN)
@torch.no_grad()
def test_features_are_those_of_the_class(
    model_type: str,
    settings: dict[str, Any],
    num_prefix_tokens: int,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    model = tiny_model(model_type, settings)
    save(model, tmp_path)
    layers = (-1,) if model_type == "vitdet" else (-1, -2, 1, 0, 2)
    for layer in layers:
        encoder = load_encoder(tmp_path, EncoderOptions(layer, torch.float32))
        frames = frames_of(encoder)
        features = encoder(frames)
        assert encoder.num_prefix_tokens == num_prefix_tokens
        assert features.shape == (1, 2, 16, 32)
        reference = expected(model, encoder, frames, layer)
        if model_type in RECORDED:
            record_property(f"parity:encoder:{model_type}", (features[0] - reference).abs().max().item())
        torch.testing.assert_close(features[0], reference, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("size", [64, 96])
@torch.no_grad()
def test_the_last_stage_of_dinov3_convnext(
    size: int, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """Its tokens are the mean and then the places of the last stage, of 32 pixels each."""
    values = {"model_type": "dinov3_convnext", "depths": [1, 1, 2, 1], "hidden_sizes": [8, 16, 24, 32]}
    save(model := tiny_model_of(values), tmp_path)
    encoder = load_encoder(tmp_path, EncoderOptions(-1, torch.float32, image_size=size))
    frames = frames_of(encoder)
    features, reference = encoder(frames)[0], expected(model, encoder, frames, -1)
    assert (encoder.num_prefix_tokens, encoder.grid, encoder.embed_dim) == (1, (size // 32, size // 32), 32)
    record_property("parity:encoder:dinov3_convnext", (features - reference).abs().max().item())
    torch.testing.assert_close(features, reference, atol=1e-6, rtol=1e-6)
    with pytest.raises(UserError, match=r"encoder\.feature_layer=-2 is not possible .*set encoder\.feature_layer=-1"):
        load_encoder(tmp_path, EncoderOptions(-2, torch.float32))
    with pytest.raises(UserError, match=r"encoder\.image_size=100 is not a multiple of .*set it to 96 or 128"):
        load_encoder(tmp_path, EncoderOptions(-1, torch.float32, image_size=100))


def test_c_radio_with_the_configuration_of_remote_code_is_the_default_of_the_native_class() -> None:
    """The file of C-RADIOv4-H names remote code and no sizes; the class of transformers has them as defaults."""
    values = {"architectures": ["RADIOModel"], "auto_map": {"AutoModel": "hf_model.RADIOModel"}, "args": {"x": 1}}
    with torch.device("meta"):
        encoder = build_encoder(values, EncoderOptions(-1, torch.float32))
    assert (encoder.embed_dim, encoder.num_prefix_tokens, encoder.grid) == (1280, 10, (14, 14))
    assert encoder.arguments == {}


REFUSED = [
    ("swin", "is hierarchical"),
    ("convnext", "is hierarchical"),
    ("resnet", "is hierarchical"),
    ("vit_mae", "returns 4 tokens for 16 patches"),
    ("bert", "takes no images"),
    ("timesformer", "fails on a plain image"),
    ("qwen2_5_vl_vision", "takes no images"),
    ("gemma4_vision", "needs pixel_position_ids"),
]


def tiny_values(model_type: str) -> dict[str, Any]:
    """Returns a small configuration with the keys of its class."""
    from transformers import AutoConfig

    config = AutoConfig.for_model(model_type)
    known = {
        name: value
        for name, value in TINY.items()
        if getattr(config, name, None) is not None and not hasattr(config, "depths")
    }
    values: dict[str, Any] = AutoConfig.for_model(model_type, **known).to_dict()
    return values


@pytest.mark.parametrize(("model_type", "why"), REFUSED)
def test_what_has_no_grid_of_patches_is_refused_in_a_sentence(model_type: str, why: str) -> None:
    with pytest.raises(
        UserError, match=f"holds a model of type '{model_type}', which {why}.*; set encoder.checkpoint"
    ) as caught:
        build_encoder(tiny_values(model_type), EncoderOptions(-1, torch.float32))
    assert "\n" not in str(caught.value)


def test_a_model_of_timm_without_timm_is_refused_in_a_sentence() -> None:
    if importlib.util.find_spec("timm"):
        pytest.skip("timm is installed")
    values = {"architecture": "vit_pe_core_large_patch14_336", "pretrained_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}
    for config in (
        values,
        values | {"model_type": "timm_wrapper"},
        {"model_type": "perception_lm", "vision_config": values},
    ):
        with pytest.raises(UserError, match=r"needs timm .*pip install timm") as caught:
            build_encoder(config, EncoderOptions(-1, torch.float32))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("model_type", "message"),
    [("of_nobody", "transformers does not support.*never run"), (None, "transformers does not support")],
)
def test_a_type_that_transformers_does_not_know(model_type: str | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_encoder(
            {"model_type": model_type, "auto_map": {"AutoModel": "code.Model"}}, EncoderOptions(-1, torch.float32)
        )


def test_frames_that_are_no_squares_are_refused() -> None:
    values = tiny_values("vit") | {"image_size": [32, 64]}
    with pytest.raises(UserError, match="has no square frames and patches"):
        build_encoder(values, EncoderOptions(-1, torch.float32))


@pytest.mark.parametrize(
    "order", [lambda t: t.unflatten(1, (4, 4)).transpose(1, 2).flatten(1, 2), lambda t: t + t.roll(1, 1)]
)
def test_patches_in_another_order_are_seen(order: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """A class with column-major patches, and one that mixes neighbours."""
    from transformers import ViTModel

    forward = ViTModel.forward

    def reordered(self: Any, *args: Any, **options: Any) -> Any:
        outputs = forward(self, *args, **options)
        hidden = outputs.last_hidden_state
        outputs.last_hidden_state = torch.cat([hidden[:, :1], order(hidden[:, 1:])], dim=1)
        return outputs

    values = tiny_values("vit") | {"layer_norm_eps": 1e-9}  # a configuration that no other test has found the layout of
    reordered.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    monkeypatch.setattr(ViTModel, "forward", reordered)
    with pytest.raises(UserError, match="mixes its patches or returns them in another order"):
        build_encoder(values, EncoderOptions(-1, torch.float32))


def test_pixels_are_normalised_as_the_processor_says(tmp_path: Path) -> None:
    save(tiny_model("vit", {}), tmp_path)
    file = tmp_path / "preprocessor_config.json"
    for values, mean, std in (
        ({"do_normalize": False}, 0.0, 255.0),  # pixels of 0…1
        ({"do_normalize": False, "do_rescale": False}, 0.0, 1.0),  # pixels of 0…255
        ({"image_mean": [0.0] * 3, "image_std": [0.5] * 3, "rescale_factor": 1 / 127.5}, 0.0, 63.75),
    ):
        file.write_text(json.dumps(values))
        encoder = load_encoder(tmp_path, EncoderOptions(-1, torch.float32))
        torch.testing.assert_close(encoder.mean.flatten(), torch.full((3,), mean))
        torch.testing.assert_close(encoder.std.flatten(), torch.full((3,), std))
    file.unlink()  # the class of ViT's processor in transformers has 0.5
    assert load_encoder(tmp_path, EncoderOptions(-1, torch.float32)).mean.flatten().tolist() == [127.5] * 3
    chosen = load_encoder(tmp_path, EncoderOptions(-1, torch.float32, mean=(0.1, 0.2, 0.3), std=(1, 1, 1)))
    torch.testing.assert_close(chosen.mean.flatten(), torch.tensor([25.5, 51, 76.5]))


def test_without_a_known_normalisation_the_keys_are_named() -> None:
    values = tiny_values("tipsv2_vision_model")
    with pytest.raises(UserError, match=r"set encoder\.image_mean and encoder\.image_std") as caught:
        build_encoder(values, EncoderOptions(-1, torch.float32))
    assert "\n" not in str(caught.value)
    assert (
        build_encoder(values, EncoderOptions(-1, torch.float32, mean=(0, 0, 0), std=(1, 1, 1))).mean.tolist()
        == [[[0]]] * 3
    )


def test_the_size_of_a_picture(tmp_path: Path) -> None:
    """DINOv2 supports any size, so its processor file decides; ViT interpolates on request; AIMv2 has one size."""
    for model_type, native in (("dinov2", 16), ("vit", 32), ("aimv2_vision_model", 32)):
        save(tiny_model(model_type, {}), folder := tmp_path / model_type)
        (folder / "preprocessor_config.json").write_text('{"size": {"height": 16, "width": 16}}')
        assert load_encoder(folder, EncoderOptions(-1, torch.float32)).transform.image_size == native  # type: ignore[union-attr]
        if model_type == "aimv2_vision_model":
            with pytest.raises(UserError, match=r"encoder\.image_size=48 is not possible.*32 pixels only"):
                load_encoder(folder, EncoderOptions(-1, torch.float32, image_size=48))
            continue
        encoder = load_encoder(folder, EncoderOptions(-1, torch.float32, image_size=48))
        assert encoder(frames_of(encoder)).shape == (1, 2, 36, 32)


def test_weights_that_play_no_part_may_be_missing(tmp_path: Path) -> None:
    """Few checkpoints of ViT have its pooler; every other weight is required."""
    save(tiny_model("vit", {}), tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    assert any(name.startswith("pooler.") for name in weights)
    kept = {name: value for name, value in weights.items() if not name.startswith("pooler.")}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    encoder = load_encoder(tmp_path, EncoderOptions(-1, torch.float32))
    assert not any("pooler" in name for name in encoder.state_dict())
    for name in ("layernorm.weight", "embeddings.cls_token"):
        save_file(
            {key: value for key, value in kept.items() if key != name},
            tmp_path / "model.safetensors",
            metadata={"format": "pt"},
        )
        with pytest.raises(UserError, match=f"lacks 1 weights of the vision tower, first: {name}"):
            load_encoder(tmp_path, EncoderOptions(-1, torch.float32))


@torch.no_grad()
def test_the_tower_of_a_whole_model(tmp_path: Path) -> None:
    """A type that no list here names, together with its language model."""
    import transformers as hf

    text = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 64,
    }
    vision = {"model_type": "dinov2_with_registers", **TINY, "num_register_tokens": 3}
    config = hf.LlavaConfig(vision_config=vision, text_config={"model_type": "qwen2", "num_key_value_heads": 2, **text})
    whole = randomize(hf.LlavaForConditionalGeneration(config), 2)
    save(whole, tmp_path)
    encoder = load_encoder(tmp_path, EncoderOptions(-1, torch.float32))
    frames = frames_of(encoder)
    assert encoder.num_prefix_tokens == 4
    torch.testing.assert_close(
        encoder(frames)[0], expected(whole.model.vision_tower, encoder, frames, -1), atol=1e-6, rtol=1e-6
    )


def test_adapters_and_checkpointing(tmp_path: Path) -> None:
    for model_type in ("dinov2_with_registers", "radio"):
        save(tiny_model(model_type, {}), folder := tmp_path / model_type)
        encoder = load_encoder(folder, EncoderOptions(-1, torch.float32))
        tower: Any = encoder.tower
        add_tower_lora(tower, LoraConfig(rank=2, alpha=4))
        assert tower.supports_gradient_checkpointing
        tower.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        encoder.train()(frames_of(encoder)).square().mean().backward()
        trained = {name for name, parameter in encoder.named_parameters() if parameter.requires_grad}
        assert trained
        assert all("lora_" in name for name in trained)
        assert all(parameter.grad is not None for parameter in encoder.parameters() if parameter.requires_grad)


def image_types() -> Iterator[str]:
    """Model types that take images, except VLMs, whose towers have types of their own."""
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    for model_type in sorted(CONFIG_MAPPING_NAMES):
        try:
            config = AutoConfig.for_model(model_type)
            parameters = inspect.signature(tower_class(config).forward).parameters
        except Exception:  # a type with no class, or that cannot be built without settings
            continue
        if {"pixel_values", "pixel_values_videos"} & parameters.keys() and not {"vision_config", "image_config"} & set(
            config.sub_configs
        ):
            yield model_type


@pytest.mark.slow
def test_every_type_in_transformers_is_taken_with_parity_or_refused_in_a_sentence(tmp_path: Path) -> None:
    wrong, taken, refused = [], set(), set()
    options = EncoderOptions(-1, torch.float32, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for model_type in image_types():
            try:
                values = tiny_values(model_type)
            except Exception:  # widths that this class wants otherwise
                continue
            try:
                build_encoder(values, options)
            except UserError as error:
                refused.add(model_type)
                wrong += [f"{model_type}: {error}"] if "\n" in str(error) else []
                continue
            if model_type == "siglip2_vision_model":  # takes patches, and has tests of its own
                continue
            taken.add(model_type)
            if model_type in ("videomae", "vjepa2"):  # take clips, likewise
                taken.add(model_type)
                continue
            model = tiny_model_of(values)
            model.save_pretrained(folder := tmp_path / model_type)
            encoder = load_encoder(folder, options)
            frames = frames_of(encoder)
            with torch.no_grad():
                difference = (encoder(frames)[0] - expected(model, encoder, frames, -1)).abs().max().item()
            wrong += [f"{model_type}: differs by {difference}"] if difference > 1e-6 else []
    assert not wrong
    assert {model_type for model_type, _, _ in TAKEN} | {"dinov3_convnext", "videomae", "vjepa2"} <= taken
    assert len(taken) > 40
    assert len(refused) > 60
    assert {"swin", "swinv2", "convnext", "hiera", "vivit", "groupvit_vision_model", "timesformer"} <= refused
