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
    """Adds adapters in float32 to a model with frozen weights.

    Head, embeddings and the routers of experts never get adapters.

    Args:
        model: Model from `load_language_model`; modified in place.
        lora: Settings of the adapters; "all-linear" selects all adaptable linear layers.

    Raises:
        UserError: A name matches no adaptable layer, or `use_experts` is set for a model without experts.
    """
    import peft

    # Full names, because peft would match a short name anywhere, in a router or in an expert too.
    settings = peft_settings(lora, _targets(model, lora.target_modules), task_type="CAUSAL_LM")
    adapted = cast("peft.PeftModel", peft.get_peft_model(model, settings))
    if lora.use_experts:
        add_expert_lora(adapted, lora)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()  # mixed precision needs float32 master weights
    return adapted


def peft_settings(lora: LoraConfig, targets: list[str], **others: Any) -> peft.LoraConfig:
    """Converts the settings to peft's class.

    Args:
        lora: Settings of the adapters.
        targets: Full names of the layers to adapt.
        **others: Further arguments of peft's class.
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
    """Returns the causal language model inside a peft model, whose layers contain the adapters."""
    # Only peft's models have `peft_config`; a captioner may hold a model without adapters.
    inner = getattr(model, "get_base_model", None)
    return cast(nn.Module, inner()) if callable(inner) and hasattr(model, "peft_config") else model


def _targets(model: nn.Module, wanted: str) -> list[str]:
    """Returns the full names of the layers to adapt.

    Raises:
        UserError: A name matches no adaptable layer.
    """
    linear = _linear_layers(model)
    if wanted == "all-linear":
        return linear
    names = [name.strip() for name in wanted.split(",") if name.strip()]
    if not names:
        raise UserError(f"{_KEY}={wanted} names no layer; set it to all-linear or to names separated by commas")
    for name in names:
        if not any(_has_name(layer, name) for layer in linear):
            known = sorted({layer.rsplit(".", 1)[-1] for layer in linear})
            raise UserError(
                f"{_KEY}={wanted} names {name}, which is no adaptable layer; choose from {', '.join(known)}, or "
                "all-linear"
            )
    return [layer for layer in linear if any(_has_name(layer, name) for name in names)]


def _has_name(layer: str, name: str) -> bool:
    # With dots at both ends, "q_proj" matches "layers.0.self_attn.q_proj" and not "layers.0.my_q_proj".
    return f".{layer}".endswith(f".{name}")


def _linear_layers(model: nn.Module) -> list[str]:
    """Returns the full names of the adaptable linear layers."""
    # The head gets no adapters, as with peft's all-linear; the chunked loss needs a plain one.
    head = getattr(model, "get_output_embeddings", lambda: None)()
    # nn.MultiheadAttention uses the weights of its inner layers directly, without adapters. Experts are adapted by
    # `use_experts`.
    excluded = [
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
        and not _is_inside(name, excluded)
    ]


def _is_inside(name: str, modules: Iterable[str]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)
