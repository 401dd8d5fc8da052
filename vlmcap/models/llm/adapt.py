"""LoRA adapters on a language model (Hu et al., https://arxiv.org/abs/2106.09685), by peft."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from torch import nn

from vlmcap.errors import UserError

if TYPE_CHECKING:
    from peft import PeftModel


def add_lora(model: nn.Module, *, rank: int, alpha: int, dropout: float, target_modules: str) -> PeftModel:
    """`model` with adapters in float32 beside its frozen weights.

    Args:
        model: As `load_language_model` returns it; changed in place.
        rank: Of the two factors.
        alpha: The adapter's output is scaled by alpha / rank.
        dropout: On the adapter's input.
        target_modules: "all-linear" (every linear layer but the head), or module names with commas between.

    Raises:
        UserError: No module has one of the names.
    """
    from peft import LoraConfig, PeftModel, get_peft_model

    targets: str | list[str] = target_modules
    if target_modules != "all-linear":
        targets = [name.strip() for name in target_modules.split(",") if name.strip()]
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets, task_type="CAUSAL_LM")
    try:
        adapted = cast(PeftModel, get_peft_model(model, config))
    except ValueError as error:
        raise UserError(f"tuning.lora.target_modules={target_modules} matches no linear layer of the language model") from error
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()  # mixed precision wants float32 masters
    return adapted


def base_model(model: nn.Module) -> nn.Module:
    """The causal language model under the adapters, with the adapters active in its layers."""
    inner = getattr(model, "get_base_model", None)
    return cast(nn.Module, inner()) if callable(inner) and hasattr(model, "peft_config") else model
