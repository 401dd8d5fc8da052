"""Projectors start from trained weights, or explain why they cannot."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from vlmcap.config import ProjectorConfig
from vlmcap.errors import UserError
from vlmcap.models.projectors import Projector, ProjectorSizes, build_projector, load_projector_weights

Make = Callable[..., tuple[ProjectorConfig, ProjectorSizes]]

DV, DL = 6, 8


def save_run(projector: Projector, file: Path) -> Path:
    weights = {f"captioner.projector.{name}": weight for name, weight in projector.state_dict().items()}
    torch.save({"state_dict": weights | {"captioner.llm.lora_A": torch.zeros(2)}, "epoch": 1}, file)
    return file


def save_folder(
    folder: Path, prefix: str, out_dim: int = DL, in_dim: int = DV, *, has_norm: bool = False
) -> dict[str, Tensor]:
    """Two shards like LLaVA's or InternVL's; that of the language model is broken, so reading it would fail."""
    folder.mkdir()
    shapes = {
        "linear_1.weight": (out_dim, in_dim),
        "linear_1.bias": (out_dim,),
        "linear_2.weight": (out_dim, out_dim),
        "linear_2.bias": (out_dim,),
    }
    if has_norm:
        shapes |= {"layer_norm.weight": (in_dim,), "layer_norm.bias": (in_dim,)}
    weights = {f"{prefix}multi_modal_projector.{name}": torch.randn(shape).bfloat16() for name, shape in shapes.items()}
    save_file(weights | {f"{prefix}vision_tower.x": torch.zeros(1)}, folder / "model-00001-of-00002.safetensors")
    (folder / "model-00002-of-00002.safetensors").write_bytes(b"broken")
    index = dict.fromkeys(weights, "model-00001-of-00002.safetensors") | {
        "language_model.x": "model-00002-of-00002.safetensors"
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return {name.removeprefix(f"{prefix}multi_modal_projector."): weight.float() for name, weight in weights.items()}


@pytest.mark.parametrize(
    "options",
    [
        {"temporal": "position"},
        {"kind": "cross_attention", "temporal": "attention"},
        {"kind": "cross_attention", "queries": "prompt"},
        {"kind": "perceiver"},
        {"kind": "c_abstractor", "temporal": "local_global"},
        {"kind": "pixel_shuffle"},
    ],
)
def test_a_saved_projector_comes_back(options: dict[str, Any], spec_of: Make, tmp_path: Path) -> None:
    trained, fresh = build_projector(*spec_of(**options)), build_projector(*spec_of(**options))
    with torch.no_grad():
        for weight in trained.parameters():
            weight.normal_()
    load_projector_weights(fresh, save_run(trained, tmp_path / "best.ckpt"))
    for name, weight in trained.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], weight), name


@pytest.mark.parametrize("prefix", ["", "model."])
def test_llavas_projector_is_read_from_its_own_shard(prefix: str, spec_of: Make, tmp_path: Path) -> None:
    theirs = save_folder(tmp_path / "llava", prefix)
    projector = build_projector(*spec_of())
    load_projector_weights(projector, str(tmp_path / "llava"))
    features = torch.randn(1, 4, 16, DV)
    hidden = torch.nn.functional.gelu(features @ theirs["linear_1.weight"].T + theirs["linear_1.bias"])
    expected = hidden @ theirs["linear_2.weight"].T + theirs["linear_2.bias"]
    torch.testing.assert_close(projector(features), expected.flatten(1, 2))
    assert {weight.dtype for weight in projector.state_dict().values()} == {torch.float32}


def test_internvls_projector_is_read_with_its_norm(spec_of: Make, tmp_path: Path) -> None:
    theirs = save_folder(tmp_path / "internvl", "", in_dim=4 * DV, has_norm=True)
    projector = build_projector(*spec_of("pixel_shuffle"))
    load_projector_weights(projector, tmp_path / "internvl")
    state = projector.state_dict()
    names = {"projection.norm": "layer_norm", "projection.layers.0": "linear_1", "projection.layers.2": "linear_2"}
    for ours, name in names.items():
        for kind in ("weight", "bias"):
            assert torch.equal(state[f"{ours}.{kind}"], theirs[f"{name}.{kind}"])


def test_the_real_classes_are_read(spec_of: Make, tmp_path: Path) -> None:
    """As transformers saves them, in one file."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    small: dict[str, Any] = {"intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    text: Any = LlamaConfig(hidden_size=DL, vocab_size=16, **small)
    vision: Any = CLIPVisionConfig(hidden_size=DV, image_size=8, patch_size=4, **small)
    theirs = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_index=15))
    theirs.save_pretrained(tmp_path)
    projector = build_projector(*spec_of())
    load_projector_weights(projector, tmp_path)
    features = torch.randn(1, 4, 16, DV)
    torch.testing.assert_close(
        projector(features), theirs.model.multi_modal_projector(features).flatten(1, 2), atol=1e-6, rtol=1e-6
    )


@pytest.mark.parametrize(
    ("theirs", "ours", "words"),
    [
        (
            {"out_dim": 4},
            {},
            r"is for a language model of width 4, but llm has width 8; set projector\.checkpoint=null to train a new",
        ),
        ({"out_dim": 4}, {"temporal": "position"}, r"is for a language model of width 4, but llm has width 8"),
        ({"out_dim": 4}, {"kind": "pixel_shuffle"}, r"is for a language model of width 4, but llm has width 8"),
        ({"in_dim": 5}, {}, r"is for tokens of width 5, but encoder, .* give tokens of width 6"),
        (
            {"in_dim": DV},
            {"frame_stack": 2},
            r"is for tokens of width 6, .*projector\.frame_stack.* of width 12",
        ),
        (
            {},
            {"temporal": "position"},
            r"lacks temporal layers \(before\.norm\.bias\); set projector\.temporal=none",
        ),
        ({}, {"temporal": "attention"}, r"lacks temporal layers .*; set projector\.temporal=none"),
        (
            {},
            {"depth": 3},
            r"another kind of projector, as it lacks projection\.layers\.4\.bias; set projector\.kind, depth",
        ),
        ({}, {"kind": "linear"}, r"another kind of projector, as it holds projection\.layers\.2\.bias"),
        ({"has_norm": True}, {}, r"another kind of projector, as it holds projection\.norm\.bias; .*use_layer_norm"),
        ({}, {"kind": "perceiver"}, r"another kind of projector"),
    ],
)
def test_what_does_not_fit_is_refused_in_words(
    theirs: dict[str, Any], ours: dict[str, Any], words: str, spec_of: Make, tmp_path: Path
) -> None:
    save_folder(tmp_path / "llava", "", **theirs)
    projector = build_projector(*spec_of(**ours))
    before = {name: weight.clone() for name, weight in projector.state_dict().items()}
    with pytest.raises(UserError, match=words) as error:
        load_projector_weights(projector, tmp_path / "llava")
    assert "\n" not in str(error.value)
    assert all(torch.equal(weight, before[name]) for name, weight in projector.state_dict().items())


@pytest.mark.parametrize(
    ("theirs", "ours", "words"),
    [
        (
            {"temporal": "position"},
            {},
            r"has temporal layers that this projector lacks .*; set projector\.temporal as it was trained",
        ),
        (
            {"temporal": "position"},
            {"temporal": "position", "num_frames": 8},
            r"before\.position\.frame with the shape \(4, 1, 6\), but",
        ),
        (
            {"kind": "perceiver"},
            {"kind": "perceiver", "num_queries": 9},
            r"latents with the shape \(4, 8\), but this projector needs \(9, 8\)",
        ),
    ],
)
def test_a_run_with_other_settings_is_refused_in_words(
    theirs: dict[str, Any], ours: dict[str, Any], words: str, spec_of: Make, tmp_path: Path
) -> None:
    file = save_run(build_projector(*spec_of(**theirs)), tmp_path / "last.ckpt")
    with pytest.raises(UserError, match=words):
        load_projector_weights(build_projector(*spec_of(**ours)), file)


@pytest.mark.parametrize("content", [b"", b"nothing", None])
def test_a_file_that_is_no_run_is_refused_in_words(content: bytes | None, spec_of: Make, tmp_path: Path) -> None:
    file = tmp_path / "x.ckpt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match=r"neither a \.ckpt file of a run nor a folder"):
        load_projector_weights(build_projector(*spec_of()), file)
    torch.save([1], file)
    with pytest.raises(UserError, match=r"neither a \.ckpt file of a run nor a folder"):
        load_projector_weights(build_projector(*spec_of()), file)


def test_weights_without_a_projector_are_refused_in_words(spec_of: Make, tmp_path: Path) -> None:
    torch.save({"state_dict": {"captioner.llm.x": torch.zeros(1)}}, tmp_path / "x.ckpt")
    for path in (tmp_path / "x.ckpt", tmp_path):
        with pytest.raises(UserError, match="holds no projector"):
            load_projector_weights(build_projector(*spec_of()), path)
    (tmp_path / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(UserError, match="could not be read"):
        load_projector_weights(build_projector(*spec_of()), tmp_path)
