"""Low-rank adapters on a language model, by peft.

LoRA (Hu et al., https://arxiv.org/abs/2106.09685), and as options DoRA (Liu et al., https://arxiv.org/abs/2402.09353)
and rsLoRA (Kalajdzievski, https://arxiv.org/abs/2312.03732).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, cast

from torch import nn

from vlmcap.config import LoraConfig
from vlmcap.errors import UserError
from vlmcap.models.llm.experts import add_expert_lora, is_router

if TYPE_CHECKING:
    import peft

_KEY = "tuning.lora.target_modules"


def add_lora(model: nn.Module, lora: LoraConfig) -> peft.PeftModel:
    """`model` with adapters in float32 beside its frozen weights.

    Head, embeddings and the routers of experts never get one.

    Args:
        model: As `load_language_model` returns it; changed in place.
        lora: Settings of the adapters; "all-linear" stands for every linear layer that may have one.

    Raises:
        UserError: A name fits no layer that may have an adapter, or experts are asked for and there are none.
    """
    import peft

    settings = peft_settings(lora, _targets(model, lora.target_modules), task_type="CAUSAL_LM")
    adapted = cast("peft.PeftModel", peft.get_peft_model(model, settings))
    if lora.use_experts:
        add_expert_lora(adapted, lora)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()  # mixed precision wants float32 masters
    return adapted


def peft_settings(lora: LoraConfig, targets: list[str], **others: Any) -> peft.LoraConfig:
    """The settings in peft's own class.

    Args:
        lora: Settings of the adapters.
        targets: Full names of the layers to adapt.
        others: Further arguments of peft's class.
    """
    import peft

    return peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
        use_dora=lora.use_dora,
        use_rslora=lora.use_rslora,
        **others,
    )


def base_model(model: nn.Module) -> nn.Module:
    """The causal language model under the adapters, with the adapters active in its layers."""
    inner = getattr(model, "get_base_model", None)
    return cast(nn.Module, inner()) if callable(inner) and hasattr(model, "peft_config") else model


def _targets(model: nn.Module, wanted: str) -> list[str]:
    """Full names of the layers to adapt.

    Raises:
        UserError: Naming the first name that fits none.
    """
    linear = _linear_layers(model)
    if wanted == "all-linear":
        return linear
    names = [name.strip() for name in wanted.split(",") if name.strip()]
    if not names:
        raise UserError(f"{_KEY}={wanted} names no layer; set it to all-linear or to names with commas between")
    for name in names:
        if not any(_has_name(layer, name) for layer in linear):
            known = sorted({layer.rsplit(".", 1)[-1] for layer in linear})
            raise UserError(
                f"{_KEY}={wanted}: {name} fits no layer that may have an adapter; choose from {', '.join(known)}, or "
                "all-linear"
            )
    return [layer for layer in linear if any(_has_name(layer, name) for name in names)]


def _has_name(layer: str, name: str) -> bool:
    return f".{layer}".endswith(f".{name}")


def _linear_layers(model: nn.Module) -> list[str]:
    """Full names of the linear layers that may have an adapter."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    # PyTorch's own attention reads its inner weights past any adapter; experts have a switch of their own.
    closed = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.MultiheadAttention) or is_router(model, name, module)
    ]
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and module is not head
        and ".experts." not in name
        and not _is_inside(name, closed)
    ]


def _is_inside(name: str, modules: Iterable[str]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)
