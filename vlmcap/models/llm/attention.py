"""The attention implementation that hardware, number format and model class allow, never silently the slow one."""

from __future__ import annotations

from typing import Any

import torch

from vlmcap.errors import UserError
from vlmcap.models.llm.repeated_keys import NAME as REPEATED
from vlmcap.models.llm.repeated_keys import needs_repeated_keys, register_repeated_keys

_FLASH = ("flash_attention_2", "flash_attention_3")
_SDPA = ("sdpa", REPEATED)
_NAMES = ("auto", *_SDPA, "eager", *_FLASH)


def choose_attention(requested: str, device: str, dtype: torch.dtype, model_class: Any = None) -> str:
    """The implementation to load with, in the words of transformers.

    Args:
        requested: "auto" (FlashAttention 2 where it is installed and works, else PyTorch's fused one), transformers' name, or
            "sdpa_repeated", which "sdpa" becomes by itself on cards that need it.
        device: Where the model will run, such as "cpu" or "cuda:0".
        dtype: Of its arithmetic.
        model_class: transformers' class, where it is known already.

    Raises:
        UserError: The implementation is unknown, or cannot run here.
    """
    if requested not in _NAMES:
        raise UserError(f"llm.attention={requested} is none of {', '.join(_NAMES)}; set it to one of them")
    if requested == "auto":
        chosen = "sdpa" if _obstacle(_FLASH[0], device, dtype, model_class) else _FLASH[0]
        return choose_attention(chosen, device, dtype, model_class)
    if obstacle := _obstacle(requested, device, dtype, model_class):
        mend = "eager, which is slow and needs much memory, or take another llm" if requested in _SDPA else "auto"
        raise UserError(f"llm.attention={requested} {obstacle}; set llm.attention={mend}")
    if requested == "sdpa" and _takes_functions(model_class) and needs_repeated_keys(device):
        requested = REPEATED
    if requested == REPEATED:
        register_repeated_keys()
    return requested


def check_attention(model: Any, chosen: str) -> None:
    """Nothing, if the loaded model runs what was chosen.

    Raises:
        UserError: transformers put another implementation in its place.
    """
    configs = {id(config): config for config in (model.config, model.config.get_text_config())}
    for config in configs.values():
        if config._attn_implementation != chosen:
            raise UserError(
                f"llm.attention={chosen} was asked for, but transformers runs {config._attn_implementation}; set llm.attention to that "
                "name to accept it"
            )


def _obstacle(name: str, device: str, dtype: torch.dtype, model_class: Any) -> str:
    """Why the implementation cannot run; empty if it can."""
    if name == "eager":
        return ""
    flag = "_supports_sdpa" if name in _SDPA else "_supports_flash_attn"
    if model_class is not None and not getattr(model_class, flag, False):
        return f"is not supported by {model_class.__name__}"
    if name == REPEATED:
        return "" if model_class is None or _takes_functions(model_class) else f"is not supported by {model_class.__name__}"
    if name == "sdpa":
        return ""
    if torch.device(device).type != "cuda":
        return f"needs a CUDA device, not {device}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "needs a card of compute capability 8.0 (Ampere) or newer"
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
