"""Low-rank adapters on a vision tower (Hu et al., https://arxiv.org/abs/2106.09685), by peft."""

from __future__ import annotations

from torch import nn

from vlmcap.errors import UserError


def add_tower_lora(tower: nn.Module, *, rank: int, alpha: int, dropout: float, use_dora: bool = False, use_rslora: bool = False) -> None:
    """Puts adapters in float32 on every linear layer of a frozen tower, in place, so that it keeps its class and interface.

    Args:
        tower: Of a `VisionEncoder`.
        rank: Of the two factors.
        alpha: The adapter's output is scaled by alpha / rank, or alpha / sqrt(rank) with `use_rslora`.
        dropout: On the adapter's input.
        use_dora: Weight-decomposed adapters.
        use_rslora: Rank-stabilised scaling.

    Raises:
        UserError: The tower has no linear layer.
    """
    from peft import LoraConfig, inject_adapter_in_model

    # Full names: in Qwen's towers a convolution has the last name of a linear layer (proj), and peft would adapt it too.
    targets = [name for name, module in tower.named_modules() if isinstance(module, nn.Linear)]
    if not targets:
        raise UserError("tuning.encoder=lora finds no linear layer in this encoder; set tuning.encoder=full or none")
    settings = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, use_dora=use_dora, use_rslora=use_rslora, target_modules=targets)
    inject_adapter_in_model(settings, tower)
    for name, parameter in tower.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if "lora_" in name:
            parameter.data = parameter.data.float()  # mixed precision wants float32 masters
