"""Selects the attention implementation of a language model, and checks which models support packed rows.

The choice depends on GPU, dtype and class, and is never silently a slow one. Without a mask, transformers calls SDPA
with grouped queries (`enable_gqa`), which only the flash kernel supports, on compute capability 8.0 or newer. On older
GPUs (T4), PyTorch silently falls back to plain matrix products with S × S numbers per head. "sdpa_repeated" repeats
keys and values, S × D numbers per head, so that the memory-efficient kernel runs.

Legend: B batch, H heads, K heads of keys and values, S sequence, D width of a head.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vlmcap.errors import UserError

REPEATED = "sdpa_repeated"
_UNGROUPED = nn.Identity()  # replaces the layer, whose attribute `num_key_value_groups` would enable grouping
FLASH = ("flash_attention_2", "flash_attention_3")
_SDPA = ("sdpa", REPEATED)
_NAMES = ("auto", *_SDPA, "eager", *FLASH)
# Model types of transformers in which all layers that mix tokens are full or windowed attention, whose mask
# transformers derives from restarting positions. Recurrent layers and convolutions have no mask.
PACKABLE = ("exaone4", "hyperclovax", "llama", "qwen2", "qwen3", "qwen3_moe")
# Model types of pretrained VLMs with positions in time, height and width, whose captioner keeps the clips apart.
PACKABLE_VLMS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5")


def choose_attention(requested: str, device: str, dtype: torch.dtype, model_class: Any = None) -> str:
    """Chooses the attention implementation that a model is loaded with, as named by transformers.

    Args:
        requested: "auto" (FlashAttention 2 if it is installed and works, otherwise SDPA), a name of transformers, or
            "sdpa_repeated", which replaces "sdpa" on GPUs that need it.
        device: Device that the model will run on, such as "cpu" or "cuda:0".
        dtype: Dtype of the arithmetic.
        model_class: transformers class, if it is known already.

    Raises:
        UserError: The implementation is unknown, or cannot run here.
    """
    if requested not in _NAMES:
        raise UserError(f"llm.attention={requested} is not one of {', '.join(_NAMES)}; set it to one of them")
    if requested == "auto":
        chosen = "sdpa" if _obstacle(FLASH[0], device, dtype, model_class) else FLASH[0]
        return choose_attention(chosen, device, dtype, model_class)
    if obstacle := _obstacle(requested, device, dtype, model_class):
        fix = "eager, which is slow and needs much memory, or choose another llm" if requested in _SDPA else "auto"
        raise UserError(f"llm.attention={requested} {obstacle}; set llm.attention={fix}")
    # GPUs before Ampere have fused kernels only for queries and keys of the same number of heads.
    if requested == "sdpa" and _takes_functions(model_class) and needs_repeated_keys(device):
        requested = REPEATED
    if requested == REPEATED:
        register_repeated_keys()
    return requested


def supported_attention(model_class: Any) -> tuple[str, ...]:
    """Returns the implementations that a transformers class claims to support, installed here or not."""
    flags = {"sdpa": "_supports_sdpa", FLASH[0]: "_supports_flash_attn"}
    return (*(name for name, flag in flags.items() if getattr(model_class, flag, False)), "eager")


def check_attention(model: Any, chosen: str) -> None:
    """Checks that a loaded model uses the chosen implementation.

    Raises:
        UserError: transformers replaced it by another one.
    """
    # The configuration of the model, and that of its text part where there are two.
    configs = {id(config): config for config in (model.config, model.config.get_text_config())}
    for config in configs.values():
        if config._attn_implementation != chosen:
            raise UserError(
                f"llm.attention={chosen} was requested, but transformers uses {config._attn_implementation}; set "
                "llm.attention to that name to accept it"
            )


def check_packing(folder: Path, name: str, *, is_vlm: bool) -> None:
    """Checks by its configuration that a model keeps the clips of a packed row apart.

    Args:
        folder: Checkpoint of a language model or a pretrained VLM in Hugging Face layout.
        name: Model as the user chose it, such as "llm=qwen3_8b".
        is_vlm: Whether all of a pretrained VLM is used, not only its language model.

    Raises:
        UserError: The model is not known to keep them apart.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    model_type = config.get_text_config().model_type
    if model_type not in PACKABLE and not (is_vlm and config.model_type in PACKABLE_VLMS):
        raise UserError(
            f"data.batching=packed puts several clips in one row, which {name} ({model_type}) is not known to keep "
            "apart; set data.batching=by_length"
        )


def is_causal(model: nn.Module) -> bool:
    """Returns whether all layers of a language model are marked as causal; False without such marks.

    In a causal model, right padding does not affect real tokens, with or without a mask, including windowed and
    recurrent layers.
    """
    # The modules of transformers that compute attention have the attribute `is_causal`.
    flags = [bool(module.is_causal) for module in model.modules() if hasattr(module, "is_causal")]
    return bool(flags) and all(flags)


def _obstacle(name: str, device: str, dtype: torch.dtype, model_class: Any) -> str:
    """Returns why the implementation cannot run; empty if it can."""
    if name == "eager":
        return ""
    flag = "_supports_sdpa" if name in _SDPA else "_supports_flash_attn"
    if model_class is not None and not getattr(model_class, flag, False):
        return f"is not supported by {model_class.__name__}"
    if name == REPEATED and model_class is not None and not _takes_functions(model_class):
        return f"is not supported by {model_class.__name__}"
    if name in _SDPA:
        return ""
    if torch.device(device).type != "cuda":
        return f"needs a CUDA device, not {device}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "needs a GPU of compute capability 8.0 (Ampere) or newer"
    if dtype not in (torch.float16, torch.bfloat16):
        return "needs hardware.precision=bf16 or fp16"
    return "" if _is_installed(name) else "needs the package flash-attn, which is not installed"


def _takes_functions(model_class: Any) -> bool:
    """Returns whether a class claims to support attention functions that are registered with transformers."""
    can_set = getattr(model_class, "_can_set_attn_implementation", None)
    # transformers looks for its attention interface in the source of the class's module.
    return can_set is not None and bool(can_set())


def _is_installed(name: str) -> bool:
    """Returns whether the package is installed; otherwise transformers might download compiled code from the hub."""
    from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

    return bool(is_flash_attn_2_available() if name == "flash_attention_2" else is_flash_attn_3_available())


def needs_repeated_keys(device: str) -> bool:
    """Returns whether the fused kernels of a device cannot group queries."""
    return torch.device(device).type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0)


def register_repeated_keys() -> None:
    """Registers `REPEATED` with transformers, with the masks of "sdpa"."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(REPEATED, repeated_keys_attention)
    AttentionMaskInterface.register(REPEATED, sdpa_mask)


def repeated_keys_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **arguments: Any
) -> tuple[Tensor, None]:
    """Computes attention like transformers' "sdpa", with repeated keys and values.

    Args:
        module: Attention layer.
        query: (B, H, S, D).
        key: (B, K, S', D), where K divides H.
        value: (B, K, S', D).
        attention_mask: bool (B or 1, H or 1, S, S'), True where a query sees a key; None for the causal mask or no
            mask.
        **arguments: Further arguments of transformers.

    Returns:
        The output (B, S, H, D), and None instead of attention weights.
    """
    from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

    # H / K: query heads per key head
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)  # (B, K, S', D) -> (B, H, S', D)
    # What transformers' "sdpa" would read from the layer, which is replaced here.
    if arguments.get("is_causal") is None:
        arguments["is_causal"] = getattr(module, "is_causal", True)
    output: tuple[Tensor, None] = sdpa_attention_forward(_UNGROUPED, query, key, value, attention_mask, **arguments)
    return output
