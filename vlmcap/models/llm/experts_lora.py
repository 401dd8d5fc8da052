"""LoRA on experts (Hu et al., https://arxiv.org/abs/2106.09685): peft finds linear layers only, and experts are none."""

from __future__ import annotations

import torch
from torch import nn

from vlmcap.errors import UserError
from vlmcap.models.llm.experts import MATRICES, fused_experts, replace_experts


def add_expert_lora(model: nn.Module, *, rank: int, alpha: int, dropout: float, use_rslora: bool) -> int:
    """The number of layers whose experts now have adapters, a pair of factors for each expert and matrix, in float32.

    Args:
        model: Changed in place; experts may be packed or not. Call peft first, as it freezes what it did not make.
        rank: Of the two factors.
        alpha: The adapter's output is scaled by alpha / rank.
        dropout: On the adapter's input.
        use_rslora: Scale by alpha / sqrt(rank) instead (Kalajdzievski, https://arxiv.org/abs/2312.03732).

    Raises:
        UserError: The model has no experts.
    """
    replace_experts(model)
    layers = fused_experts(model)
    if not layers:
        raise UserError("tuning.lora.use_experts=true, but the language model has no experts; set it to false")
    for experts in layers:
        experts.add_lora(rank, alpha / (rank**0.5 if use_rslora else rank), dropout)
    return len(layers)


@torch.no_grad()
def merge_expert_lora(model: nn.Module) -> int:
    """The number of layers whose experts took their adapters in; the adapters are gone afterwards.

    Raises:
        UserError: The experts are in 4 bit, where a merge would round the adapters away.
    """
    layers = [experts for experts in fused_experts(model) if len(experts.lora_A)]
    if any(experts.is_packed for experts in layers):
        raise UserError("adapters on experts cannot be merged into 4 bit; load the base with llm.quantization=none to merge")
    for experts in layers:
        for name in MATRICES:
            weight = getattr(experts, name)
            for expert in range(experts.num_experts):  # one at a time: all deltas of a layer in float32 are twice its experts
                delta = experts.lora_B[name][expert] @ experts.lora_A[name][expert]
                weight[expert] = (weight[expert].float() + experts.lora_scale * delta).to(weight.dtype)
        experts.lora_A, experts.lora_B = nn.ParameterDict(), nn.ParameterDict()
    return len(layers)
