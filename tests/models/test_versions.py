"""A transformers version that is too old is refused where results would be wrong, and nowhere else."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest
import torch

from vlmcap.errors import UserError
from vlmcap.models.llm.experts_quantization import expert_quantization
from vlmcap.models.llm.load import quantization_config
from vlmcap.models.pretrained import load_pretrained

OPTIONS = {"dtype": torch.float32, "quantization": "none", "attention": "sdpa", "device": "cpu", "max_patches": 16}


@pytest.mark.parametrize("version", ["5.17.0", "5.22.1"])
def test_an_older_one_is_refused_for_whole_models_and_for_experts(
    version: str, qwen_folders: dict[str, Path], moe_folder: Path, llm_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    sentence = rf"need transformers 5\.23 or newer, .* but {version} is installed"
    with pytest.raises(UserError, match=f"the Qwen-VL models {sentence}"):
        load_pretrained(qwen_folders["qwen3_vl"], **OPTIONS)
    with pytest.raises(UserError, match=f"quantised experts {sentence}"):
        expert_quantization(moe_folder, quantization_config("4bit", torch.float32))
    expert_quantization(llm_folder, quantization_config("4bit", torch.float32))


@pytest.mark.parametrize("version", ["5.23.0", "5.24.0.dev0"])
def test_the_least_one_and_a_preview_of_a_later_one_are_taken(
    version: str, moe_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    expert_quantization(moe_folder, quantization_config("4bit", torch.float32))
