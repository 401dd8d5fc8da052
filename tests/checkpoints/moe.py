"""A tiny mixture of experts, saved as the hub's files are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def moe_folder(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Saves a random Qwen3-MoE, 8 experts and 2 per token, as sharded files with a tensor per expert and matrix."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    folder = tmp_path_factory.mktemp("qwen3-moe")
    torch.manual_seed(5)
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        moe_intermediate_size=64,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        initializer_range=0.1,
    )
    Qwen3MoeForCausalLM(config).save_pretrained(folder, max_shard_size="150KB")
    tokenizer.save_pretrained(folder)
    return folder
