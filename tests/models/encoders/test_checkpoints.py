"""Vision towers are loaded from every published layout, without reading other weights."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.checkpoints.encoders import SQUARE, Checkpoint, hidden_state, randomize
from vlmcap.errors import UserError
from vlmcap.models.encoders import EncoderOptions, load_encoder

TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
DECODER = TEXT | {"num_key_value_heads": 2, "vocab_size": 64}


def copy_of(checkpoint: Checkpoint, folder: Path) -> Checkpoint:
    """Copies the checkpoint, so that a test may change its files."""
    shutil.copytree(checkpoint.folder, folder)
    return Checkpoint(checkpoint.family, folder, checkpoint.model, checkpoint.processor, checkpoint.num_prefix_tokens)


def rewrite(folder: Path, weights: dict[str, Tensor]) -> None:
    save_file(
        {name: tensor.contiguous() for name, tensor in weights.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )


@torch.no_grad()
def assert_same_features(checkpoint: Checkpoint, layer: int = -2) -> None:
    encoder = checkpoint.load(layer)
    frames = torch.randint(0, 256, (1, 2, 3, 56, 56), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected = hidden_state(checkpoint, (frames[0].float() - encoder.mean) / encoder.std, layer)
    torch.testing.assert_close(encoder(frames)[0], expected, atol=1e-5, rtol=1e-5)


def save_whole(kind: str, checkpoint: Checkpoint, folder: Path, **arguments: Any) -> Checkpoint:
    """Saves a larger model that contains the checkpoint's tower."""
    import transformers as hf

    vision = checkpoint.model.config.to_dict()
    text = TEXT | {"vocab_size": 50, "max_position_embeddings": 8}
    if kind == "clip":
        whole: Any = hf.CLIPModel(hf.CLIPConfig(vision_config=vision, text_config=text))
        tower = whole.vision_model
    elif kind == "siglip":
        whole = hf.SiglipModel(hf.SiglipConfig(vision_config=vision, text_config=text))
        tower = whole.vision_model
    elif kind == "llava":
        decoder = hf.LlamaConfig(**DECODER)
        config = hf.LlavaNextVideoConfig(
            vision_config=vision, text_config=decoder, image_token_index=60, video_token_index=61
        )
        whole = hf.LlavaNextVideoForConditionalGeneration(config)
        tower = whole.model.vision_tower
    else:
        config = hf.InternVLConfig(
            vision_config=checkpoint.model.config, text_config=hf.Qwen2Config(**DECODER), image_token_id=60
        )
        whole = hf.InternVLForConditionalGeneration(config)
        tower = whole.model.vision_tower
    tower.load_state_dict(checkpoint.model.state_dict(), strict=True)
    whole.save_pretrained(folder, **arguments)
    return Checkpoint(checkpoint.family, folder, checkpoint.model, checkpoint.processor, checkpoint.num_prefix_tokens)


WHOLE = [("clip", "clip"), ("llava", "clip"), ("siglip", "siglip"), ("internvl", "internvit")]


@pytest.mark.parametrize(("kind", "family"), WHOLE)
def test_towers_of_whole_checkpoints(
    checkpoints: dict[str, Checkpoint], tmp_path: Path, kind: str, family: str
) -> None:
    assert_same_features(save_whole(kind, checkpoints[family], tmp_path))


@pytest.mark.parametrize(("kind", "family"), WHOLE)
def test_files_without_a_tensor_of_the_tower_are_not_opened(
    checkpoints: dict[str, Checkpoint], tmp_path: Path, kind: str, family: str
) -> None:
    """Shards of the language model and of unused blocks may be missing.

    Layer -2 does not need them.
    """
    whole = save_whole(kind, checkpoints[family], tmp_path, max_shard_size="12KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    behind = re.compile(r"\.layers?\.2\.|post_layernorm|tower\.layernorm|\.head\.")
    needed = {file for name, file in index.items() if "vision" in name and not behind.search(name)}
    unneeded = set(index.values()) - needed
    assert any("text" in name or "language" in name for name, file in index.items() if file in unneeded)
    assert any("vision" in name for name, file in index.items() if file in unneeded)
    for file in unneeded:
        (tmp_path / file).unlink()
    assert_same_features(whole)
    with pytest.raises(UserError, match=r"encoder\.checkpoint .* could not be read"):
        whole.load(-1)


@pytest.mark.parametrize(
    "prefix", ["vision_tower.vision_model.", "model.vision_tower.", "model.vision_tower.vision_model.", "vision_model."]
)
@pytest.mark.parametrize("family", ["clip", "siglip", "internvit"])
def test_older_prefixes(checkpoints: dict[str, Checkpoint], tmp_path: Path, family: str, prefix: str) -> None:
    checkpoint = copy_of(checkpoints[family], tmp_path / "copy")
    weights = {prefix + name: tensor for name, tensor in load_file(checkpoint.folder / "model.safetensors").items()}
    rewrite(checkpoint.folder, weights | {"language_model.model.norm.weight": torch.ones(3)})
    assert_same_features(checkpoint)


def test_blocks_of_dinov3_at_the_top_or_one_level_down(checkpoints: dict[str, Checkpoint], tmp_path: Path) -> None:
    for folder, prefix in (("hub", ""), ("class", "model.")):
        checkpoint = copy_of(checkpoints["dinov3"], tmp_path / folder)
        weights = load_file(checkpoint.folder / "model.safetensors")
        renamed = {(prefix + name if name.startswith("layer.") else name): tensor for name, tensor in weights.items()}
        assert (renamed.keys() == weights.keys()) == (folder == "hub")
        rewrite(checkpoint.folder, renamed)
        encoder, frames = checkpoint.load(), torch.zeros(1, 1, 3, 64, 64, dtype=torch.uint8)
        with torch.no_grad():
            expected = hidden_state(checkpoint, -(encoder.mean / encoder.std).expand(1, 3, 64, 64), -1)
            torch.testing.assert_close(encoder(frames)[0], expected, atol=1e-5, rtol=1e-5)


def remote_layout(model: Any, values: dict[str, Any], folder: Path) -> None:
    """Writes a model in the layout of OpenGVLab's checkpoints.

    Their names, one tensor of queries, keys and values, code to be refused.
    """
    weights = dict(model.state_dict())
    for index in range(model.config.num_hidden_layers):
        attention = f"encoder.layer.{index}.attention."
        for kind in ("weight", "bias"):
            if attention + "q_proj." + kind in weights:
                parts = [weights.pop(f"{attention}{part}_proj.{kind}") for part in "qkv"]
                weights[f"encoder.layers.{index}.attn.qkv.{kind}"] = torch.cat(parts)
    names = (
        ("embeddings.cls_token", "embeddings.class_embedding"),
        ("embeddings.position_embeddings", "embeddings.position_embedding"),
        ("embeddings.patch_embeddings.projection", "embeddings.patch_embedding"),
        ("encoder.layer.", "encoder.layers."),
        ("attention.projection_layer", "attn.proj"),
        ("attention.", "attn."),
        ("layernorm_before", "norm1"),
        ("layernorm_after", "norm2"),
        ("lambda_", "ls"),
    )
    remote = {}
    for name, tensor in weights.items():
        for old, new in names:
            name = name.replace(old, new)
        remote[name] = tensor
    folder.mkdir(exist_ok=True)
    rewrite(folder, remote)
    auto_map = {
        "AutoConfig": "configuration_intern_vit.InternVisionConfig",
        "AutoModel": "modeling_intern_vit.InternVisionModel",
    }
    (folder / "modeling_intern_vit.py").write_text("raise SystemExit('remote code was run')\n")
    (folder / "configuration_intern_vit.py").write_text("raise SystemExit('remote code was run')\n")
    config = {
        "model_type": "intern_vit_6b",
        "architectures": ["InternVisionModel"],
        "auto_map": auto_map,
        "use_flash_attn": True,
    }
    (folder / "config.json").write_text(json.dumps(config | values))


@pytest.mark.parametrize("is_large", [False, True])
@pytest.mark.parametrize("layer", [-1, -2])
def test_internvit_in_the_remote_layout(tmp_path: Path, is_large: bool, layer: int) -> None:
    """The 300M model has biases and LayerNorm, the 6B model query and key norms and RMSNorm."""
    from transformers import GotOcr2ImageProcessorPil, InternVLVisionConfig, InternVLVisionModel

    norm = "rms_norm" if is_large else "layer_norm"
    config = InternVLVisionConfig(**SQUARE, attention_bias=not is_large, use_qk_norm=is_large, norm_type=norm)
    model = randomize(InternVLVisionModel(config), 6)
    values = SQUARE | {
        "qkv_bias": not is_large,
        "qk_normalization": is_large,
        "norm_type": norm,
        "initializer_factor": 0.1,
    }
    remote_layout(model, values | {"dropout": 0.0, "drop_path_rate": 0.1, "initializer_range": 1e-10}, tmp_path)
    names = load_file(tmp_path / "model.safetensors")
    assert {"embeddings.class_embedding", "encoder.layers.0.attn.qkv.weight", "encoder.layers.2.ls1"} <= names.keys()
    assert ("encoder.layers.0.attn.q_norm.weight" in names) == is_large
    assert_same_features(Checkpoint("internvit", tmp_path, model, GotOcr2ImageProcessorPil(), 1), layer)


def test_values_that_a_remote_configuration_leaves_out_are_its_classs() -> None:
    from vlmcap.models.encoders.families import family_of

    values = family_of("intern_vit_6b").config_values(
        {"model_type": "intern_vit_6b", "num_hidden_layers": 45, "image_size": 448}
    )
    assert values["hidden_size"] == 3200
    assert values["norm_type"] == "rms_norm"
    assert (values["use_qk_norm"], values["attention_bias"]) == (True, False)
    assert (values["num_hidden_layers"], values["image_size"]) == (45, 448)


def test_pickled_weights_only_where_there_are_no_others(checkpoints: dict[str, Checkpoint], tmp_path: Path) -> None:
    checkpoint = copy_of(checkpoints["clip"], tmp_path / "copy")
    file, pickled = checkpoint.folder / "model.safetensors", checkpoint.folder / "pytorch_model.bin"
    pickled.write_bytes(b"not opened")
    assert_same_features(checkpoint)
    torch.save({f"vision_model.{name}": tensor for name, tensor in load_file(file).items()}, pickled)
    weights = torch.load(pickled, weights_only=True)
    file.unlink()
    assert_same_features(checkpoint)
    torch.save(weights, pickled, _use_new_zipfile_serialization=False)  # as before torch 1.6
    assert_same_features(checkpoint)
    pickled.write_bytes(b"")
    with pytest.raises(UserError, match="could not be read"):
        checkpoint.load()
    torch.save({"vision_model.embeddings.class_embedding": pytest.raises}, pickled)
    with pytest.raises(UserError, match="could not be read"):
        checkpoint.load()


def test_missing_or_broken_weights_are_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """transformers would initialise missing weights randomly."""
    broken = copy_of(checkpoint, tmp_path / "copy")
    file = broken.folder / "model.safetensors"
    weights = load_file(file)
    name = next(name for name in weights if "q_proj.weight" in name)
    rewrite(broken.folder, {key: value for key, value in weights.items() if key != name})
    with pytest.raises(UserError, match=r"lacks 1 weights .*q_proj\.weight"):
        broken.load()
    rewrite(broken.folder, weights | {name: weights[name][:16]})
    with pytest.raises(UserError, match=r"q_proj\.weight of shape \(16, 32\), but its config\.json needs \(32, 32\)"):
        broken.load()
    file.write_bytes(b"no weights")
    with pytest.raises(UserError, match=r"encoder\.checkpoint"):
        broken.load()
    file.unlink()
    with pytest.raises(UserError, match=r"encoder\.checkpoint .* no model\.safetensors"):
        broken.load()
    (broken.folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"encoder\.checkpoint .* no config\.json"):
        broken.load()


def test_loading_leaves_the_random_state_alone(checkpoint: Checkpoint) -> None:
    """Otherwise the random state of a run would depend on the encoder."""
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    checkpoint.load()
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize("family", ["clip", "siglip", "dinov3", "internvit"])
def test_weights_go_straight_to_the_device(family: str, checkpoints: dict[str, Checkpoint]) -> None:
    encoder = load_encoder(checkpoints[family].folder, EncoderOptions(-2, torch.bfloat16), "meta")
    assert {tensor.device.type for tensor in (*encoder.parameters(), *encoder.buffers())} == {"meta"}
