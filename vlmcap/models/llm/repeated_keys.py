"""Fused attention on cards where PyTorch's fused kernels do not group queries: keys and values are repeated for them.

Without a mask, transformers asks SDPA to group queries (`enable_gqa`). Only the flash kernel can, and it needs compute capability 8.0. On
older cards (T4) PyTorch falls back to plain matrix products in silence, which hold S × S numbers a head. Repeated keys and values,
which are S × D numbers a head, let the memory-efficient kernel run.

Legend: B batch, H heads, K heads of keys and values, S sequence, D width of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

NAME = "sdpa_repeated"
_UNGROUPED = nn.Identity()  # in place of the layer, which would say how many queries share a key


def needs_repeated_keys(device: str) -> bool:
    """Whether the fused kernels of a device cannot group queries."""
    return torch.device(device).type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0)


def register_repeated_keys() -> None:
    """Makes `NAME` known to transformers, with the masks of "sdpa"."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, repeated_keys_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def repeated_keys_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **arguments: Any
) -> tuple[Tensor, None]:
    """Attention as transformers' "sdpa" has it, (B, S, H, D), and no weights.

    Args:
        module: The layer.
        query: (B, H, S, D).
        key: (B, K, S', D), where K divides H.
        value: As the keys.
        attention_mask: True where a query sees a key, (B or 1, H or 1, S, S'); None where the causal mask alone counts, or none.
        **arguments: As transformers passes them.
    """
    from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

    groups = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    if arguments.get("is_causal") is None:
        arguments["is_causal"] = getattr(module, "is_causal", True)
    output: tuple[Tensor, None] = sdpa_attention_forward(_UNGROUPED, query, key, value, attention_mask, **arguments)
    return output
