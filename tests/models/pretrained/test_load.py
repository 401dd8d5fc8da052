"""Pretrained VLMs, and their vision encoders alone.

What is refused, quantisation, training, and true sizes on the meta device.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.checkpoints.pretrained import VISION
from vlmcap.config import LlmConfig, LoraConfig
from vlmcap.data.loading.collate import Collator
from vlmcap.errors import UserError
from vlmcap.models.captioner import VideoCaptioner
from vlmcap.models.decoding.settings import GenerationSettings
from vlmcap.models.encoders.tower import add_tower_lora
from vlmcap.models.known import known_config
from vlmcap.models.llm.adapt import add_lora
from vlmcap.models.llm.experts import fused_experts
from vlmcap.models.llm.prompt import load_prompt
from vlmcap.models.pretrained import (
    VlmComponents,
    build_meta_vision,
    build_pretrained,
    check_kind,
    load_pretrained,
    load_vision,
)
from vlmcap.models.pretrained.families import model_class, parsed_config
from vlmcap.types import Batch, Clip, Sample

KINDS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")


def load(folder: Path, **changes: Any) -> VlmComponents:
    options: dict[str, Any] = {
        "dtype": torch.float32,
        "quantization": "none",
        "attention": "sdpa",
        "device": "cpu",
        "max_patches": 64,
    }
    return load_pretrained(folder, **options | changes)


def adapted(parts: VlmComponents, folder: Path) -> tuple[VideoCaptioner, Batch]:
    """Returns a captioner with LoRA on its language model, and a batch of two clips of different sizes."""
    around = {"visual_prefix": parts.visual_prefix, "visual_suffix": parts.visual_suffix}
    prompt = load_prompt(folder, LlmConfig(prompt="설명해 주세요."), **around)
    llm = add_lora(parts.llm, LoraConfig(rank=4, alpha=8))
    captioner = parts.captioner_class(parts.encoder, parts.projector, llm, prompt, GenerationSettings(max_new_tokens=4))
    transform, samples = parts.encoder.transform, []
    for row, (height, width) in enumerate(((84, 112), (128, 56))):
        frames = torch.randint(
            0, 256, (4, 3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(row)
        )
        grid = transform.grid_thw(4, height, width)
        samples.append(Sample(Clip(str(row), Path("clip.mp4"), ("산이다.",)), frames=transform(frames), grid_thw=grid))
    visual = parts.layout((2, *parts.encoder.grid))
    return captioner, Collator(prompt, visual, 200)(samples)


@pytest.mark.parametrize("kind", VISION)
def test_training_moves_mergers_and_adapters_and_nothing_else(kind: str, qwen_folders: dict[str, Path]) -> None:
    captioner, batch = adapted(load(qwen_folders[kind]), qwen_folders[kind])
    trained = {name: parameter for name, parameter in captioner.named_parameters() if parameter.requires_grad}
    frozen = {
        name: parameter.detach().clone()
        for name, parameter in captioner.named_parameters()
        if not parameter.requires_grad
    }
    before = {name: parameter.detach().clone() for name, parameter in trained.items()}
    assert all(name.startswith("projector.") or (name.startswith("llm.") and "lora_" in name) for name in trained)
    assert not any("lm_head" in name for name in trained)
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-3)
    losses = []
    for _ in range(4):
        loss, count = captioner(batch)
        (loss / count).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    now = dict(captioner.named_parameters())
    assert all(torch.equal(frozen[name], now[name]) for name in frozen)
    assert [name for name in before if torch.equal(before[name], now[name])] == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_the_encoder_can_be_trained(kind: str, tuning: str, qwen_folders: dict[str, Path]) -> None:
    """Clips of two sizes, so that one is padded.

    Adapters on linear layers alone, not on the convolution that shares a name with one.
    """
    parts = load(qwen_folders[kind])
    if tuning == "lora":
        add_tower_lora(parts.encoder.tower, LoraConfig(rank=2, alpha=4))
    else:
        parts.encoder.requires_grad_(True)
    captioner, batch = adapted(parts, qwen_folders[kind])
    captioner.train()(batch)[0].backward()
    trained = {name: parameter for name, parameter in parts.encoder.named_parameters() if parameter.requires_grad}
    assert trained
    assert [name for name, parameter in trained.items() if parameter.grad is None] == []
    assert not any("patch_embed" in name and "lora_" in name for name in trained)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
def test_the_language_part_alone_is_quantised(kind: str, quantization: str, qwen_folders: dict[str, Path]) -> None:
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    if (kind, quantization) == ("qwen3_vl_moe", "8bit"):
        with pytest.raises(UserError, match=r"8bit would leave the experts .* set llm\.quantization=4bit"):
            load(qwen_folders[kind], quantization=quantization)
        return
    parts = load(qwen_folders[kind], quantization=quantization)
    assert all(experts.is_packed for experts in fused_experts(parts.llm))
    assert len(fused_experts(parts.llm)) == (3 if kind == "qwen3_vl_moe" else 0)
    quantised = (Linear4bit, Linear8bitLt)
    layers = [
        module
        for name, module in parts.llm.named_modules()
        if isinstance(module, torch.nn.Linear) and "lm_head" not in name
    ]
    assert len(layers) == 3 * (4 if kind == "qwen3_vl_moe" else 7)
    assert all(isinstance(layer, quantised) for layer in layers)
    rest = [*parts.encoder.modules(), *parts.projector.modules(), parts.llm.lm_head]
    assert not any(isinstance(module, quantised) for module in rest)
    assert all(parameter.dtype == torch.float32 for parameter in parts.projector.parameters())


@pytest.mark.parametrize("kind", VISION)
def test_adapters_learn_on_a_4bit_language_part(kind: str, qwen_folders: dict[str, Path]) -> None:
    parts = load(qwen_folders[kind], quantization="4bit", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in parts.encoder.parameters()} == {torch.bfloat16}
    captioner, batch = adapted(parts, qwen_folders[kind])
    captioner.llm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = captioner.train()(batch)
    loss.backward()
    learning = [parameter for parameter in captioner.parameters() if parameter.requires_grad]
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in learning)
    if not captioner.use_continuous_batching:  # the native engine takes prompts only, without captions
        assert len(captioner.eval().generate(batch)) == 2


def test_another_kind_is_refused(qwen_folders: dict[str, Path], llava_folder: Path, llm_folder: Path) -> None:
    check_kind("mrope", qwen_folders["qwen2_vl"])
    check_kind("frames", llava_folder)
    for kind, folder, message in (
        ("mrope", qwen_folders["qwen3_vl"], r"model\.checkpoint .* is of type qwen3_vl, whose .* set model=custom"),
        ("timed_mrope", llava_folder, "is of type llava_next_video"),
        (
            "frames",
            llm_folder,
            "type qwen3, but .*, as it is no model of images and text",
        ),
    ):
        with pytest.raises(UserError, match=message) as caught:
            check_kind(kind, folder)
        assert "\n" not in str(caught.value)


def test_a_part_of_a_model_is_refused(qwen_folders: dict[str, Path], tmp_path: Path) -> None:
    """transformers would initialise them randomly."""
    folder = shutil.copytree(qwen_folders["qwen2_vl"], tmp_path / "copy")
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if "merger" in name)
    save_file(
        {key: value for key, value in weights.items() if key != name},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    with pytest.raises(UserError, match="lacks 1 weights"):
        load(folder)
    (folder / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(UserError, match=r"model\.checkpoint"):
        load(folder)


def test_a_budget_below_one_token_is_refused(qwen_folders: dict[str, Path]) -> None:
    with pytest.raises(UserError, match=r"encoder\.max_patches must be at least 4"):
        load(qwen_folders["qwen2_vl"], max_patches=3)


def test_the_processor_file_decides(qwen_folders: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(qwen_folders["qwen3_vl"], tmp_path / "copy")
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0, 0, 0], "image_std": [1, 1, 1], "resample": 2})
    )
    parts = load(folder)
    assert parts.encoder.mean.flatten().tolist() == [0, 0, 0]
    assert parts.encoder.transform.resampling == "bilinear"


@pytest.mark.parametrize(
    ("checkpoint", "width", "billions"),
    [
        ("llava-hf/LLaVA-NeXT-Video-7B-hf", 1024, 7.06),
        ("Qwen/Qwen2-VL-7B-Instruct", 1280, 8.29),
        ("Qwen/Qwen2.5-VL-3B-Instruct", 1280, 3.75),
        ("Qwen/Qwen2.5-VL-7B-Instruct", 1280, 8.29),
        ("Qwen/Qwen2.5-VL-32B-Instruct", 1280, 33.45),
        ("Qwen/Qwen3-VL-2B-Instruct", 4 * 1024, 2.13),
        ("Qwen/Qwen3-VL-4B-Instruct", 4 * 1024, 4.44),
        ("Qwen/Qwen3-VL-8B-Instruct", 4 * 1152, 8.77),
        ("Qwen/Qwen3-VL-32B-Instruct", 4 * 1152, 33.36),
        ("Qwen/Qwen3-VL-30B-A3B-Instruct", 4 * 1152, 31.07),
    ],
)
def test_true_sizes(checkpoint: str, width: int, billions: float) -> None:
    """The components hold all weights but those that only images use, and blocks behind the chosen layer."""
    config = known_config(checkpoint)
    assert config is not None
    parts = build_pretrained(config, dtype=torch.bfloat16, max_patches=1024)
    with torch.device("meta"):
        whole = model_class(config["model_type"])(parsed_config(config))
    unused = 0
    if config["model_type"] == "llava_next_video":
        tower = whole.model.vision_tower
        left_out = (*tower.encoder.layers[-1].parameters(), *tower.post_layernorm.parameters())
        unused = sum(parameter.numel() for parameter in (*left_out, whole.model.image_newline))
    modules = (parts.encoder, parts.projector, parts.llm)
    count = sum(parameter.numel() for module in modules for parameter in module.parameters())
    total = sum(parameter.numel() for parameter in whole.parameters())
    assert count == total - unused
    assert total / 1e9 == pytest.approx(billions, abs=0.01)
    assert parts.encoder.embed_dim == width
    assert all(parameter.is_meta for module in modules for parameter in module.parameters())


OPTIONS: dict[str, Any] = {"dtype": torch.float32, "attention": "sdpa", "device": "cpu", "max_patches": 24}


@pytest.fixture(params=[*VISION, "llava_next_video"])
def folder(request: pytest.FixtureRequest, qwen_folders: dict[str, Path], llava_folder: Path) -> Path:
    return qwen_folders.get(request.param, llava_folder)


def test_features_are_those_of_the_whole_model(folder: Path) -> None:
    whole = load_pretrained(folder, quantization="none", **OPTIONS).encoder
    alone = load_vision(folder, **OPTIONS)
    assert alone.transform == whole.transform
    assert alone.possible_grids(4) == whole.possible_grids(4)
    assert not any(parameter.requires_grad for parameter in alone.parameters())
    pixels = torch.randint(0, 256, (4, 3, 48, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    grid = alone.transform.grid_thw(4, 48, 64)
    with torch.no_grad():
        features, expected = (encoder(encoder.transform(pixels)[None], grid and [grid]) for encoder in (alone, whole))
    assert features.abs().max() > 0
    assert torch.equal(features, expected)


def test_a_sketch_has_the_sizes_and_no_weights(folder: Path) -> None:
    meta_encoder = build_meta_vision(folder, dtype=torch.float32, max_patches=24)
    loaded = load_vision(folder, **OPTIONS)
    assert all(parameter.is_meta for parameter in meta_encoder.parameters())
    assert (meta_encoder.transform, meta_encoder.embed_dim, meta_encoder.grid) == (
        loaded.transform,
        loaded.embed_dim,
        loaded.grid,
    )
    assert meta_encoder.possible_grids(4) == loaded.possible_grids(4)
    assert sum(p.numel() for p in meta_encoder.parameters()) == sum(p.numel() for p in loaded.parameters())


@pytest.mark.parametrize(("is_on_host", "place"), [(False, "meta"), (True, "cpu")])
def test_weights_go_straight_to_the_device(folder: Path, is_on_host: bool, place: str) -> None:
    options: Any = OPTIONS | {"device": "meta"}
    parts = load_pretrained(folder, quantization="none", is_on_host=is_on_host, **options)
    assert {parameter.device.type for part in (parts.encoder.tower, parts.llm) for parameter in part.parameters()} == {
        place
    }
    alone = load_vision(folder, **options)
    assert {tensor.device.type for tensor in (*alone.parameters(), *alone.buffers())} == {"meta"}


def test_a_missing_weight_of_the_tower_is_said(qwen_folders: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(qwen_folders["qwen2_vl"], tmp_path / "copy"))
    weights = load_file(folder / "model.safetensors")
    weights.pop(next(name for name in weights if "visual.blocks.0" in name))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="lacks 1 weights"):
        load_vision(folder, **OPTIONS)
