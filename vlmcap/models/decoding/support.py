"""Which language models our own decoding may run."""

from __future__ import annotations

from typing import Any

from torch import nn

from vlmcap.models.llm.adapt import base_model
from vlmcap.models.llm.attention import PACKABLE

_ATTENTION = ("sdpa", "eager")  # FlashAttention takes no mask in which each row ends at a place of its own
_ROTARY = ("default", "linear", "llama3", "yarn")  # others change all rows' angles with the longest row
# Settings of a checkpoint's generation file that transformers' generate follows beside those that vlmcap sets.
_EXTRAS = (
    "bad_words_ids",
    "begin_suppress_tokens",
    "exponential_decay_length_penalty",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "guidance_scale",
    "min_length",
    "min_new_tokens",
    "sequence_bias",
    "stop_strings",
    "suppress_tokens",
)


def can_decode(llm: nn.Module) -> bool:
    """Whether `greedy_ids` writes what transformers' generate would: all layers see all keys, and nothing else steers the choice."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    model: Any = base_model(llm)
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "lm_head") or config.model_type not in PACKABLE:
        return False
    rotary = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    is_full = all(type(layer) is DynamicLayer for layer in DynamicCache(config=config).layers)
    asked = getattr(model, "generation_config", None)
    is_steered = any(getattr(asked, name, None) for name in _EXTRAS)
    return bool(is_full and not is_steered and config._attn_implementation in _ATTENTION and rotary in _ROTARY)
