"""Which models our own decoding takes, and that the others go through transformers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from vlmcap.models.decoding.engine import can_decode
from vlmcap.models.llm.adapt import add_lora

SMALL: dict[str, Any] = {
    "vocab_size": 20,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


def make(kind: str, **changes: Any) -> Any:
    import transformers

    with torch.device("meta"):
        return getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**SMALL | changes))


def test_full_attention_is_taken_with_and_without_adapters() -> None:
    for kind in ("Llama", "Qwen2", "Qwen3", "Qwen3Moe"):
        assert can_decode(make(kind)), kind
    assert can_decode(add_lora(make("Qwen3"), rank=2, alpha=2, dropout=0.0, target_modules="all-linear"))


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("Qwen3", {"layer_types": ["sliding_attention", "full_attention"], "use_sliding_window": True, "sliding_window": 8}),
        ("Gemma2", {}),
        ("Llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}),
    ],
)
def test_windows_other_classes_and_moving_angles_are_not(kind: str, changes: dict[str, Any]) -> None:
    assert not can_decode(make(kind, **changes))


def test_what_only_transformers_does_is_left_to_it() -> None:
    model = make("Llama")
    model.generation_config.suppress_tokens = [3]
    assert not can_decode(model)
    model = make("Llama")
    model.config._attn_implementation = "flash_attention_2"
    assert not can_decode(model)
    assert not can_decode(nn.Linear(2, 2))


def test_the_captioner_is_imported_without_transformers() -> None:
    code = "import sys, vlmcap.models.captioner; print('transformers' in sys.modules, 'torch' in sys.modules)"
    root = Path(__file__).resolve().parents[3]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout.split() == ["False", "True"]
