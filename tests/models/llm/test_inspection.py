"""Descriptions of language model checkpoints; models of many classes train and caption as described."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import CAPTIONS
from vlmcap.config import LlmConfig, LoraConfig, MlpConfig, Temporal
from vlmcap.data.loading.collate import Collator
from vlmcap.errors import UserError
from vlmcap.models.captioner import VideoCaptioner
from vlmcap.models.decoding.engine import native_engine_obstacle
from vlmcap.models.decoding.settings import GenerationSettings
from vlmcap.models.llm.adapt import add_lora
from vlmcap.models.llm.inspection import describe_llm, license_of
from vlmcap.models.llm.load import load_language_model
from vlmcap.models.llm.prompt import VisualRun, load_prompt
from vlmcap.models.projectors import ProjectorSizes, build_projector
from vlmcap.types import Clip, Sample

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LINEAR = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}
# Name of a class's configuration -> what it needs beside the sizes.
CLASSES: dict[str, dict[str, Any]] = {
    **{
        name: {}
        for name in [
            "llama",
            "mistral",
            "ministral",
            "qwen2",
            "qwen3",
            "gemma",
            "phi",
            "phi3",
            "granite",
            "cohere",
            "cohere2",
            "olmo",
            "olmo2",
            "olmo3",
            "smollm3",
        ]
    },
    **{
        name: {}
        for name in [
            "stablelm",
            "starcoder2",
            "exaone4",
            "hyperclovax",
            "glm",
            "glm4",
            "nemotron",
            "helium",
            "apertus",
            "arcee",
            "seed_oss",
            "ernie4_5",
        ]
    },
    **{name: {} for name in ["hunyuan_v1_dense", "bitnet", "gpt_neox", "opt"]},
    **{name: {"query_pre_attn_scalar": 16} for name in ("gemma2", "gemma3_text")},
    **{name: {"num_local_experts": 4} for name in ("mixtral", "granitemoe", "gpt_oss")},
    **{name: EXPERTS for name in ("qwen2_moe", "qwen3_moe")},
    "qwen3_next": EXPERTS | LINEAR,
    "qwen3_5_text": LINEAR,
    "lfm2": {"layer_types": ["conv", "full_attention"]},
}
# What the modules of these classes look for; a class that is not here looks for nothing.
PACKAGES = {
    "qwen3_next": ("causal-conv1d", "flash-linear-attention"),
    "qwen3_5_text": ("causal-conv1d", "flash-linear-attention"),
    "lfm2": ("causal-conv1d",),
}


def save(kind: str, tokenizer: Any, folder: Path) -> Path:
    """Saves a tiny random model in the layout of the hub."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, vocab_size=len(tokenizer), **(SIZES | CLASSES[kind]))
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def copied(folder: Path, target: Path, *left_out: str) -> Path:
    return Path(shutil.copytree(folder, target / "copy", ignore=shutil.ignore_patterns(*left_out)))


@pytest.mark.parametrize("kind", CLASSES)
def test_a_model_of_any_class_trains_and_captions_as_it_was_described(
    kind: str, tokenizer: Any, tmp_path: Path
) -> None:
    folder = save(kind, tokenizer, tmp_path)
    found = describe_llm(folder)
    assert (found.problems, found.hidden_size, found.num_layers, found.vocab_size) == ((), 64, 2, len(tokenizer))
    assert found.optional_packages == PACKAGES.get(kind, ())
    attention = "sdpa" if "sdpa" in found.attention else "eager"
    loaded = load_language_model(folder, dtype=torch.float32, quantization="none", attention=attention, device="cpu")
    assert type(loaded).__name__ == found.model_class
    assert (not native_engine_obstacle(loaded)) == found.is_native
    llm = add_lora(loaded, LoraConfig(rank=4, alpha=8))
    prompt = load_prompt(folder, LlmConfig(prompt="설명해 주세요."))
    sizes = ProjectorSizes(in_dim=8, out_dim=found.hidden_size, grid=(2, 2), num_frames=2)
    projector = build_projector(MlpConfig(temporal=Temporal.none), sizes)
    captioner = VideoCaptioner(None, projector, llm, prompt, GenerationSettings(4))
    items = [Sample(Clip(text, "clip.mp4", (text,)), features=torch.randn(2, 4, 8)) for text in CAPTIONS[:2]]
    visual = VisualRun(lambda frames, grid: frames * grid[0] * grid[1], (2, 2, 2))
    loss, num_tokens = captioner(Collator(prompt, visual, 64)(items))
    loss.backward()  # type: ignore[no-untyped-call]
    assert num_tokens > 0
    assert torch.isfinite(loss)
    assert all(
        parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in captioner.projector.parameters()
    )
    assert len(captioner.eval().generate(Collator(prompt, visual, 64, mode="generate")(items))) == 2


def test_a_description_needs_no_weights(llm_folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    found = describe_llm(copied(llm_folder, tmp_path, "*.safetensors"))
    assert (found.model_class, found.model_type, found.is_part, found.context) == (
        "Qwen3ForCausalLM",
        "qwen3",
        False,
        512,
    )
    assert (found.largest_id, found.vocab_size) == (len(tokenizer) - 1, len(tokenizer))
    assert (found.has_chat_template, found.has_thinking_switch) == (True, True)
    assert found.end_tokens == (
        "<|im_end|>",
        "<|endoftext|>",
    )  # the template's own first, then that of generation_config.json
    assert (found.is_packable, found.is_native, found.sliding_window, found.license) == (True, True, None, "")


def test_generation_settings_that_steer_leave_captions_to_transformers(llm_folder: Path, tmp_path: Path) -> None:
    folder = copied(llm_folder, tmp_path, "*.safetensors")
    file = folder / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"suppress_tokens": [5]}))
    assert not describe_llm(folder).is_native


def test_windows_are_named_where_layers_look_through_them(tokenizer: Any, tmp_path: Path) -> None:
    folder = save("mistral", tokenizer, tmp_path)
    assert describe_llm(folder).sliding_window == 4096
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"sliding_window": None}))
    assert describe_llm(folder).sliding_window is None


def test_what_is_missing_is_asked_for_by_its_key(llm_folder: Path, tmp_path: Path) -> None:
    folder = copied(llm_folder, tmp_path, "*.safetensors", "*.jinja")
    found = describe_llm(folder)
    assert not found.has_chat_template
    assert found.end_tokens == ()
    assert len(found.problems) == 1
    assert "no chat template; set llm.chat_template" in found.problems[0]
    template = "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    given = describe_llm(folder, chat_template=template)
    assert (given.problems, given.end_tokens[0], given.has_thinking_switch) == ((), "<|im_end|>", False)


def test_a_checkpoint_without_tokenizer_is_described_all_the_same(llm_folder: Path, tmp_path: Path) -> None:
    found = describe_llm(copied(llm_folder, tmp_path, "*.safetensors", "token*", "*.jinja"))
    assert (found.largest_id, found.hidden_size) == (None, 64)
    assert "tokenizer" in found.problems[0]


def test_tokens_beyond_the_embedding_are_counted(llm_folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    folder = copied(llm_folder, tmp_path, "*.safetensors")
    plain = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    plain["added_tokens"].append({"id": len(tokenizer), "content": "드론", "special": False, **flags})
    (folder / "tokenizer.json").write_text(json.dumps(plain, ensure_ascii=False), encoding="utf-8")
    found = describe_llm(folder)
    assert found.largest_id == found.vocab_size
    assert "'드론'" in found.problems[0]


def test_no_language_model(siglip_folder: Path) -> None:
    with pytest.raises(UserError, match=r"llm\.checkpoint .* not a causal language model"):
        describe_llm(siglip_folder)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"README.md": "---\nlicense: apache-2.0\ntags: [ko]\n---\n# A model\n"}, "apache-2.0"),
        ({"README.md": "---\nlicense: other\nlicense_name: exaone\n---\n"}, "exaone"),
        ({"README.md": "---\nlicense: other\n---\n"}, "other"),
        ({"README.md": "---\nlicense: [mit, cc-by-4.0]\n---\n"}, "mit, cc-by-4.0"),
        ({"README.md": "# A model\n", "LICENSE": "\n  Llama 3 Community License\n\nText"}, "Llama 3 Community License"),
        ({"README.md": "---\nlicense: [\n---\n"}, ""),
        ({}, ""),
    ],
)
def test_the_license_is_the_one_that_the_folder_states(files: dict[str, str], expected: str, tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert license_of(tmp_path) == expected
