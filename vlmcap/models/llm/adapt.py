"""Low-rank adapters on a language model, by peft.

LoRA (Hu et al., https://arxiv.org/abs/2106.09685), and as options DoRA (Liu et al., https://arxiv.org/abs/2402.09353) and rsLoRA
(Kalajdzievski, https://arxiv.org/abs/2312.03732).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, cast

from torch import nn

from vlmcap.errors import UserError
from vlmcap.models.llm.experts import add_expert_lora, is_router

if TYPE_CHECKING:
    from peft import PeftModel

_KEY = "tuning.lora.target_modules"


def add_lora(
    model: nn.Module,
    *,
    rank: int,
    alpha: int,
    dropout: float,
    target_modules: str,
    use_dora: bool = False,
    use_rslora: bool = False,
    use_experts: bool = False,
) -> PeftModel:
    """`model` with adapters in float32 beside its frozen weights; head, embeddings and the routers of experts never get one.

    Args:
        model: As `load_language_model` returns it; changed in place.
        rank: Of the two factors.
        alpha: The adapter's output is scaled by alpha / rank, or by alpha / sqrt(rank) with `use_rslora`.
        dropout: On the adapter's input.
        target_modules: "all-linear" (every linear layer that may have an adapter), or module names with commas between.
        use_dora: Learn the length of each weight column beside its direction.
        use_rslora: Another scale, which lets higher ranks learn more.
        use_experts: Plain LoRA on the experts of a mixture-of-experts model too.

    Raises:
        UserError: A name fits no layer that may have an adapter, or experts are asked for and there are none.
    """
    from peft import LoraConfig, get_peft_model

    if use_dora and use_experts:
        raise UserError("tuning.lora.use_dora=true does not reach experts; set it or tuning.lora.use_experts to false")
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=_targets(model, target_modules),
        use_dora=use_dora,
        use_rslora=use_rslora,
        task_type="CAUSAL_LM",
    )
    adapted = cast("PeftModel", get_peft_model(model, config))
    if use_experts:
        add_expert_lora(adapted, rank=rank, alpha=alpha, dropout=dropout, use_rslora=use_rslora)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()  # mixed precision wants float32 masters
    return adapted


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
                f"{_KEY}={wanted}: {name} fits no layer that may have an adapter; choose from {', '.join(known)}, or all-linear"
            )
    return [layer for layer in linear if any(_has_name(layer, name) for name in names)]


def _has_name(layer: str, name: str) -> bool:
    return f".{layer}".endswith(f".{name}")


def _linear_layers(model: nn.Module) -> list[str]:
    """Full names of the linear layers that may have an adapter."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    # PyTorch's own attention reads its inner weights past any adapter; experts have a switch of their own.
    closed = [name for name, module in model.named_modules() if isinstance(module, nn.MultiheadAttention) or is_router(model, name, module)]
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head and ".experts." not in name and not _is_inside(name, closed)
    ]


def _is_inside(name: str, modules: Iterable[str]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)
