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
from vlmcap.models.llm.prompt import VisualRun, load_prompt
from vlmcap.models.pretrained import VlmComponents, build_meta_vision, build_pretrained, load_pretrained, load_vision
from vlmcap.types import Batch, Clip, Sample

KINDS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")


def load(kind: str, folder: Path, **changes: Any) -> VlmComponents:
    options: dict[str, Any] = {
        "dtype": torch.float32,
        "quantization": "none",
        "attention": "sdpa",
        "device": "cpu",
        "max_patches": 64,
    }
    return load_pretrained(kind, folder, **options | changes)


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
    visual = parts.visual_layout or VisualRun(parts.num_tokens, (2, *parts.encoder.grid))
    return captioner, Collator(prompt, visual, 200)(samples)


@pytest.mark.parametrize("kind", KINDS)
def test_training_moves_mergers_and_adapters_and_nothing_else(kind: str, qwen_folders: dict[str, Path]) -> None:
    captioner, batch = adapted(load(kind, qwen_folders[kind]), qwen_folders[kind])
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
    parts = load(kind, qwen_folders[kind])
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

    parts = load(kind, qwen_folders[kind], quantization=quantization)
    quantised = (Linear4bit, Linear8bitLt)
    layers = [
        module
        for name, module in parts.llm.named_modules()
        if isinstance(module, torch.nn.Linear) and "lm_head" not in name
    ]
    assert len(layers) == 3 * 7
    assert all(isinstance(layer, quantised) for layer in layers)
    rest = [*parts.encoder.modules(), *parts.projector.modules(), parts.llm.lm_head]
    assert not any(isinstance(module, quantised) for module in rest)
    assert all(parameter.dtype == torch.float32 for parameter in parts.projector.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_learn_on_a_4bit_language_part(kind: str, qwen_folders: dict[str, Path]) -> None:
    parts = load(kind, qwen_folders[kind], quantization="4bit", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in parts.encoder.parameters()} == {torch.bfloat16}
    captioner, batch = adapted(parts, qwen_folders[kind])
    captioner.llm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = captioner.train()(batch)
    loss.backward()
    learning = [parameter for parameter in captioner.parameters() if parameter.requires_grad]
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in learning)
    captions = captioner.eval().generate(batch)
    assert len(captions) == 2


def test_another_kind_is_refused(qwen_folders: dict[str, Path], llava_folder: Path, llm_folder: Path) -> None:
    for kind, folder in (
        ("qwen2_vl", qwen_folders["qwen3_vl"]),
        ("qwen2_5_vl", llava_folder),
        ("llava_next_video", llm_folder),
    ):
        with pytest.raises(UserError, match=r"model\.checkpoint .* is of type \w+, not") as caught:
            load(kind, folder)
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
        load("qwen2_vl", folder)
    (folder / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(UserError, match=r"model\.checkpoint"):
        load("qwen2_vl", folder)


def test_a_budget_below_one_token_is_refused(qwen_folders: dict[str, Path]) -> None:
    with pytest.raises(UserError, match=r"encoder\.max_patches must be at least 4"):
        load("qwen2_vl", qwen_folders["qwen2_vl"], max_patches=3)


def test_the_processor_file_decides(qwen_folders: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(qwen_folders["qwen3_vl"], tmp_path / "copy")
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0, 0, 0], "image_std": [1, 1, 1], "resample": 2})
    )
    parts = load("qwen3_vl", folder)
    assert parts.encoder.mean.flatten().tolist() == [0, 0, 0]
    assert parts.encoder.transform.resampling == "bilinear"


@pytest.mark.parametrize(
    ("kind", "checkpoint", "width"),
    [
        ("llava_next_video", "llava-hf/LLaVA-NeXT-Video-7B-hf", 1024),
        ("qwen2_vl", "Qwen/Qwen2-VL-7B-Instruct", 1280),
        ("qwen2_5_vl", "Qwen/Qwen2.5-VL-7B-Instruct", 1280),
        ("qwen3_vl", "Qwen/Qwen3-VL-8B-Instruct", 4 * 1152),
    ],
)
def test_true_sizes(kind: str, checkpoint: str, width: int) -> None:
    """The components hold all weights but the last vision block and the newline, which LLaVA uses for images only."""
    import transformers

    config = known_config(checkpoint)
    assert config is not None
    with torch.device("meta"):
        parts = build_pretrained(kind, config, dtype=torch.bfloat16, max_patches=1024)
        model_class = getattr(transformers, config["architectures"][0])
        whole = model_class(model_class.config_class.from_dict(config))
    unused = 0
    if kind == "llava_next_video":
        tower = whole.model.vision_tower
        unused = sum(
            p.numel()
            for p in (
                *tower.encoder.layers[-1].parameters(),
                *tower.post_layernorm.parameters(),
                whole.model.image_newline,
            )
        )
    modules = (parts.encoder, parts.projector, parts.llm)
    count = sum(parameter.numel() for module in modules for parameter in module.parameters())
    total = sum(parameter.numel() for parameter in whole.parameters())
    assert count == total - unused
    assert total / 1e9 == pytest.approx(
        {"qwen2_vl": 8.29, "qwen2_5_vl": 8.29, "qwen3_vl": 8.77, "llava_next_video": 7.06}[kind], abs=0.01
    )
    assert parts.encoder.embed_dim == width
    assert all(parameter.is_meta for module in modules for parameter in module.parameters())


OPTIONS: dict[str, Any] = {"dtype": torch.float32, "attention": "sdpa", "device": "cpu", "max_patches": 24}


@pytest.fixture(params=[*VISION, "llava_next_video"])
def case(request: pytest.FixtureRequest, qwen_folders: dict[str, Path], llava_folder: Path) -> tuple[str, Path]:
    kind: str = request.param
    return kind, qwen_folders.get(kind, llava_folder)


def test_features_are_those_of_the_whole_model(case: tuple[str, Path]) -> None:
    kind, folder = case
    whole = load_pretrained(kind, folder, quantization="none", **OPTIONS).encoder
    alone = load_vision(kind, folder, **OPTIONS)
    assert alone.transform == whole.transform
    assert alone.possible_grids(4) == whole.possible_grids(4)
    assert not any(parameter.requires_grad for parameter in alone.parameters())
    pixels = torch.randint(0, 256, (4, 3, 48, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    grid = alone.transform.grid_thw(4, 48, 64)
    with torch.no_grad():
        features, expected = (encoder(encoder.transform(pixels)[None], grid and [grid]) for encoder in (alone, whole))
    assert features.abs().max() > 0
    assert torch.equal(features, expected)


def test_a_sketch_has_the_sizes_and_no_weights(case: tuple[str, Path]) -> None:
    kind, folder = case
    meta_encoder = build_meta_vision(kind, folder, dtype=torch.float32, max_patches=24)
    loaded = load_vision(kind, folder, **OPTIONS)
    assert all(parameter.is_meta for parameter in meta_encoder.parameters())
    assert (meta_encoder.transform, meta_encoder.embed_dim, meta_encoder.grid) == (
        loaded.transform,
        loaded.embed_dim,
        loaded.grid,
    )
    assert meta_encoder.possible_grids(4) == loaded.possible_grids(4)
    assert sum(p.numel() for p in meta_encoder.parameters()) == sum(p.numel() for p in loaded.parameters())


@pytest.mark.parametrize(("is_on_host", "place"), [(False, "meta"), (True, "cpu")])
def test_weights_go_straight_to_the_device(case: tuple[str, Path], is_on_host: bool, place: str) -> None:
    kind, folder = case
    options: Any = OPTIONS | {"device": "meta"}
    parts = load_pretrained(kind, folder, quantization="none", is_on_host=is_on_host, **options)
    assert {parameter.device.type for part in (parts.encoder.tower, parts.llm) for parameter in part.parameters()} == {
        place
    }
    alone = load_vision(kind, folder, **options)
    assert {tensor.device.type for tensor in (*alone.parameters(), *alone.buffers())} == {"meta"}


def test_a_missing_weight_of_the_tower_is_said(qwen_folders: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(qwen_folders["qwen2_vl"], tmp_path / "copy"))
    weights = load_file(folder / "model.safetensors")
    weights.pop(next(name for name in weights if "visual.blocks.0" in name))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="lacks 1 weights"):
        load_vision("qwen2_vl", folder, **OPTIONS)
    with pytest.raises(UserError, match="not qwen3_vl; choose the model="):
        build_meta_vision("qwen3_vl", folder, dtype=torch.float32, max_patches=24)
