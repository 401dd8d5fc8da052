"""The attention of a language model.

The implementation that runs it, and which models keep the clips of a packed row apart.

Hardware, number format and class decide on the implementation, and never is it silently the slow one. Without a mask,
transformers asks SDPA to group queries (`enable_gqa`). Only the flash kernel can, and it needs compute capability 8.0.
On older GPUs (T4) PyTorch falls back to plain matrix products in silence, which hold S × S numbers for each head.
"sdpa_repeated" repeats keys and values, which are S × D numbers for each head, so that the memory-efficient kernel
runs.

Legend: B batch, H heads, K heads of keys and values, S sequence, D width of a head.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vlmcap.errors import UserError

REPEATED = "sdpa_repeated"
_UNGROUPED = nn.Identity()  # in place of the layer, which would say how many queries share a key
FLASH = ("flash_attention_2", "flash_attention_3")
_SDPA = ("sdpa", REPEATED)
_NAMES = ("auto", *_SDPA, "eager", *FLASH)
# Names of transformers' configurations. In these classes, every layer that looks at other tokens is attention, full or
# in a window, and transformers derives its mask from positions that start anew. Recurrent layers and convolutions have
# no mask to derive.
PACKABLE = ("exaone4", "hyperclovax", "llama", "qwen2", "qwen3", "qwen3_moe")


def choose_attention(requested: str, device: str, dtype: torch.dtype, model_class: Any = None) -> str:
    """The implementation to load with, in the words of transformers.

    Args:
        requested: "auto" (FlashAttention 2 where it is installed and works, else PyTorch's fused one), transformers'
            name, or "sdpa_repeated", which "sdpa" becomes by itself on GPUs that need it.
        device: Where the model will run, such as "cpu" or "cuda:0".
        dtype: Of its arithmetic.
        model_class: transformers' class, where it is known already.

    Raises:
        UserError: The implementation is unknown, or cannot run here.
    """
    if requested not in _NAMES:
        raise UserError(f"llm.attention={requested} is none of {', '.join(_NAMES)}; set it to one of them")
    if requested == "auto":
        chosen = "sdpa" if _obstacle(FLASH[0], device, dtype, model_class) else FLASH[0]
        return choose_attention(chosen, device, dtype, model_class)
    if obstacle := _obstacle(requested, device, dtype, model_class):
        mend = "eager, which is slow and needs much memory, or take another llm" if requested in _SDPA else "auto"
        raise UserError(f"llm.attention={requested} {obstacle}; set llm.attention={mend}")
    if requested == "sdpa" and _takes_functions(model_class) and needs_repeated_keys(device):
        requested = REPEATED
    if requested == REPEATED:
        register_repeated_keys()
    return requested


def supported_attention(model_class: Any) -> tuple[str, ...]:
    """The implementations that a class of transformers supports by its own account, whatever is installed here."""
    flags = {"sdpa": "_supports_sdpa", FLASH[0]: "_supports_flash_attn"}
    return (*(name for name, flag in flags.items() if getattr(model_class, flag, False)), "eager")


def check_attention(model: Any, chosen: str) -> None:
    """Nothing, if the loaded model runs what was chosen.

    Raises:
        UserError: transformers put another implementation in its place.
    """
    configs = {id(config): config for config in (model.config, model.config.get_text_config())}
    for config in configs.values():
        if config._attn_implementation != chosen:
            raise UserError(
                f"llm.attention={chosen} was asked for, but transformers runs {config._attn_implementation}; set "
                "llm.attention to that "
                "name to accept it"
            )


def check_packing(folder: Path, name: str) -> None:
    """Nothing, if clips of one row do not see each other in the model of a checkpoint; reads its configuration alone.

    Args:
        folder: Checkpoint in Hugging Face layout, of a language model or of a whole model that is taken apart into one.
        name: Of the model, as the user chose it, such as "llm=qwen3_8b".

    Raises:
        UserError: It is not known to keep them apart.
    """
    from transformers import AutoConfig

    model_type = AutoConfig.from_pretrained(folder, trust_remote_code=False).get_text_config().model_type
    if model_type not in PACKABLE:
        raise UserError(
            f"data.batching=packed puts several clips in one row, which {name} ({model_type}) is not known to keep "
            "apart; "
            "set data.batching=by_length"
        )


def is_causal(model: nn.Module) -> bool:
    """Whether no token of a language model sees a later one, by the account of its own layers.

    False where they say nothing.

    Padding behind the real tokens then changes nothing for them, with or without a mask, in windowed and recurrent
    layers too.
    """
    flags = [bool(module.is_causal) for module in model.modules() if hasattr(module, "is_causal")]
    return bool(flags) and all(flags)


def _obstacle(name: str, device: str, dtype: torch.dtype, model_class: Any) -> str:
    """Why the implementation cannot run; empty if it can."""
    if name == "eager":
        return ""
    flag = "_supports_sdpa" if name in _SDPA else "_supports_flash_attn"
    if model_class is not None and not getattr(model_class, flag, False):
        return f"is not supported by {model_class.__name__}"
    if name == REPEATED:
        return (
            ""
            if model_class is None or _takes_functions(model_class)
            else f"is not supported by {model_class.__name__}"
        )
    if name == "sdpa":
        return ""
    if torch.device(device).type != "cuda":
        return f"needs a CUDA device, not {device}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "needs a GPU of compute capability 8.0 (Ampere) or newer"
    if dtype not in (torch.float16, torch.bfloat16):
        return "needs hardware.precision=bf16 or fp16"
    return "" if _is_installed(name) else "needs the package flash-attn, which is not installed"


def _takes_functions(model_class: Any) -> bool:
    """Whether the layers of a class run any attention that is registered with transformers, by its own account."""
    can_set = getattr(model_class, "_can_set_attn_implementation", None)
    return can_set is not None and bool(can_set())


def _is_installed(name: str) -> bool:
    """Whether the package is here; without it transformers would fetch compiled code from the hub where it can."""
    from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

    return bool(is_flash_attn_2_available() if name == "flash_attention_2" else is_flash_attn_3_available())


def needs_repeated_keys(device: str) -> bool:
    """Whether the fused kernels of a device cannot group queries."""
    return torch.device(device).type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0)


def register_repeated_keys() -> None:
    """Makes `REPEATED` known to transformers, with the masks of "sdpa"."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(REPEATED, repeated_keys_attention)
    AttentionMaskInterface.register(REPEATED, sdpa_mask)


def repeated_keys_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **arguments: Any
) -> tuple[Tensor, None]:
    """Attention as transformers' "sdpa" has it, (B, S, H, D), and no weights.

    Args:
        module: The layer.
        query: (B, H, S, D).
        key: (B, K, S', D), where K divides H.
        value: As the keys.
        attention_mask: True where a query sees a key, (B or 1, H or 1, S, S'); None where the causal mask alone counts,
            or none.
        **arguments: As transformers passes them.
    """
    from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

    groups = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    if arguments.get("is_causal") is None:
        arguments["is_causal"] = getattr(module, "is_causal", True)
    output: tuple[Tensor, None] = sdpa_attention_forward(_UNGROUPED, query, key, value, attention_mask, **arguments)
    return output
