"""Loading a language model, quantised or not, and preparing it for tuning."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from vlmcap.errors import UserError


def quantization_config(kind: str, compute_dtype: torch.dtype) -> Any:
    """The bitsandbytes configuration of `kind`: NF4 with double quantisation for "4bit", LLM.int8() for "8bit", None for "none".

    Source: Dettmers et al., "QLoRA", https://arxiv.org/abs/2305.14314.
    """
    if kind == "none":
        return None
    from transformers import BitsAndBytesConfig

    if kind == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def load_language_model(folder: Path, *, dtype: torch.dtype, quantization: str, attention: str, device: str) -> nn.Module:
    """A causal language model with every parameter frozen.

    Args:
        folder: Checkpoint in Hugging Face layout; its own code is never run.
        dtype: Of unquantised weights, and of the arithmetic on quantised ones.
        quantization: "none", "8bit" or "4bit".
        attention: transformers' name of the attention implementation.
        device: Where quantised weights are put while loading, such as "cpu" or "cuda:0".

    Raises:
        UserError: The folder holds no causal language model, or only a part of one.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": attention, "trust_remote_code": False, "output_loading_info": True}
    if quantization != "none":
        options |= {"quantization_config": quantization_config(quantization, dtype), "device_map": device}
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(folder, **options)
    except (ValueError, KeyError, OSError, ImportError, RuntimeError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"llm.checkpoint {folder} could not be loaded as a causal language model: {reason}") from error
    if missing := sorted(loading["missing_keys"]):  # transformers would fill them with random numbers
        raise UserError(f"llm.checkpoint {folder} lacks {len(missing)} weights, first: {missing[0]}; take a whole checkpoint")
    return cast(nn.Module, model).requires_grad_(False).eval()


def context_length(folder: Path) -> int:
    """Tokens that the model's positions reach, read from its configuration alone."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    return int(config.get_text_config().max_position_embeddings)
