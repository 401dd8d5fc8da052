"""Experts of a mixture-of-experts language model: packed to 4 bit or not, with adapters or without, and how routers are recognised.

transformers keeps the experts of a layer in two fused parameters. bitsandbytes and peft look for linear layers, so the one leaves them in
16 bit and the other gives them no adapters.

Legend: N tokens, K experts a token, E experts, H hidden size, I intermediate size of an expert, R adapter rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmcap.config import LoraConfig
from vlmcap.errors import UserError

if TYPE_CHECKING:
    from bitsandbytes.nn import Params4bit

MATRICES = ("gate_up_proj", "down_proj")  # (E, 2 I, H) and (E, H, I)
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")  # how configurations call E
BLOCK = 64  # weights that share a scale
SCALE_BLOCK = 256  # scales that share a scale of their own


def pack_experts(weight: Tensor) -> Params4bit:
    """The experts' weights in NF4 with double quantisation: the same bits as bitsandbytes gives for the whole tensor.

    One expert is worked on at a time, because the CPU kernel needs several times the memory of its input.

    Args:
        weight: (E, out, in), where out x in is a multiple of 64, so that no scale is shared by two experts.

    Source: Dettmers et al., "QLoRA", https://arxiv.org/abs/2305.14314.
    """
    from bitsandbytes.functional import QuantState, quantize_4bit, quantize_blockwise
    from bitsandbytes.nn import Params4bit

    assert weight[0].numel() % BLOCK == 0, "replace_experts lets no other through"
    packed, scales = [], []
    for expert in weight:
        bits, state = quantize_4bit(expert.contiguous(), blocksize=BLOCK, quant_type="nf4")
        packed.append(bits)
        scales.append(state.absmax)
    scale = torch.cat(scales)
    offset = scale.mean()
    scale_bits, scale_state = quantize_blockwise(scale - offset, blocksize=SCALE_BLOCK)
    state = QuantState(
        absmax=scale_bits,
        shape=weight.shape,
        dtype=weight.dtype,
        blocksize=BLOCK,
        code=state.code,
        quant_type="nf4",
        offset=offset,
        state2=scale_state,
    )
    bits = torch.cat(packed)
    return Params4bit(bits, requires_grad=False, quant_state=state, blocksize=BLOCK, quant_type="nf4", bnb_quantized=True)


def is_packed(weight: Tensor) -> bool:
    """Whether the weights are 4-bit numbers with their scales beside them."""
    return weight.dtype == torch.uint8 and getattr(weight, "quant_state", None) is not None


def unpack_expert(weight: Params4bit, expert: int, dtype: torch.dtype) -> Tensor:
    """The weights (out, in) of one expert out of `pack_experts`'s result, as `dtype`."""
    from bitsandbytes.functional import QuantState, dequantize_4bit, dequantize_blockwise

    state = weight.quant_state
    shape = torch.Size(state.shape[1:])
    blocks = shape.numel() // BLOCK
    start, stop = expert * blocks, (expert + 1) * blocks
    first, last = start // SCALE_BLOCK, -(-stop // SCALE_BLOCK)  # whole blocks of scales around the expert's own
    scale = dequantize_blockwise(
        state.absmax[first * SCALE_BLOCK : last * SCALE_BLOCK],
        absmax=state.state2.absmax[first:last],
        code=state.state2.code,
        blocksize=SCALE_BLOCK,
    )
    scale = scale[start - first * SCALE_BLOCK : stop - first * SCALE_BLOCK] + state.offset
    one = QuantState(absmax=scale, shape=shape, dtype=dtype, blocksize=BLOCK, code=state.code, quant_type=state.quant_type)
    bits = weight.detach().as_subclass(Tensor)
    return dequantize_4bit(bits[expert * blocks * BLOCK // 2 : (expert + 1) * blocks * BLOCK // 2], one)


class _PackedLinear(torch.autograd.Function):
    """x W^T with one expert's packed W. Autograd keeps nothing: W is unpacked again on the way back."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Params4bit, expert: int) -> Tensor:
        ctx.weight, ctx.expert, ctx.dtype = weight, expert, hidden.dtype
        return F.linear(hidden, unpack_expert(weight, expert, hidden.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        # Under autocast the output, hence its gradient, may have another type than the input.
        return gradients[0].to(ctx.dtype) @ unpack_expert(ctx.weight, ctx.expert, ctx.dtype), None, None


class FusedExperts(nn.Module):
    """SwiGLU experts run one after the other, only those that a token chose.

    Args:
        gate_up_proj: (E, 2 I, H). While a model is loaded in 4 bit it has no data yet, and `pack_experts`'s result takes its place.
        down_proj: (E, H, I), likewise.
        act_fn: Of the gate.
    """

    def __init__(self, gate_up_proj: nn.Parameter, down_proj: nn.Parameter, act_fn: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.shapes = dict(zip(MATRICES, (tuple(gate_up_proj.shape), tuple(down_proj.shape)), strict=True))
        self.num_experts = gate_up_proj.shape[0]
        self.gate_up_proj = gate_up_proj
        self.down_proj = down_proj
        self.act_fn = act_fn
        self.lora_A = nn.ParameterDict()
        self.lora_B = nn.ParameterDict()
        self.lora_scale = 0.0
        self.lora_dropout = 0.0

    @property
    def is_packed(self) -> bool:
        """Whether all weights are stored in 4 bit."""
        return all(is_packed(getattr(self, name)) for name in MATRICES)

    @property
    def compute_dtype(self) -> torch.dtype:
        """The type that the weights had, or have."""
        return cast(torch.dtype, getattr(self.gate_up_proj, "quant_state", self.gate_up_proj).dtype)

    def add_lora(self, rank: int, scale: float, dropout: float) -> None:
        """Adapters in float32 on both matrices of every expert, which change nothing until they are trained."""
        self.lora_scale, self.lora_dropout = scale, dropout
        device = self.gate_up_proj.device
        for name, (experts, out_dim, in_dim) in self.shapes.items():
            bound = in_dim**-0.5  # what Kaiming's uniform start with a = sqrt(5), peft's own, comes to
            self.lora_A[name] = nn.Parameter(torch.empty(experts, rank, in_dim, device=device).uniform_(-bound, bound))
            self.lora_B[name] = nn.Parameter(torch.zeros(experts, out_dim, rank, device=device))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The weighted sum (N, H) of the chosen experts' outputs, in the type of the input.

        Args:
            hidden_states: (N, H).
            top_k_index: (N, K) experts of each token.
            top_k_weights: (N, K).
        """
        top_k = top_k_index.shape[-1]
        order = top_k_index.flatten().argsort(stable=True)
        counts = torch.bincount(top_k_index.flatten(), minlength=self.num_experts).tolist()
        inputs = hidden_states[order // top_k].to(self.compute_dtype).split(counts)
        # Taken apart once: an index for each expert would make a gradient of the full size for each expert.
        factors = {name: (self.lora_A[name].unbind(), self.lora_B[name].unbind()) for name in self.lora_A}
        outputs = []
        for expert, tokens in enumerate(inputs):
            if len(tokens):
                gate, up = self._linear("gate_up_proj", tokens, expert, factors).chunk(2, dim=-1)
                outputs.append(self._linear("down_proj", self.act_fn(gate) * up, expert, factors))
        weighted = torch.cat(outputs)[order.argsort()].unflatten(0, (-1, top_k)) * top_k_weights[..., None]
        return weighted.sum(1).to(hidden_states.dtype)

    def _linear(self, name: str, hidden: Tensor, expert: int, factors: dict[str, tuple[tuple[Tensor, ...], tuple[Tensor, ...]]]) -> Tensor:
        weight = getattr(self, name)
        output = _PackedLinear.apply(hidden, weight, expert) if is_packed(weight) else F.linear(hidden, weight[expert])
        if not factors:
            return cast(Tensor, output)
        down, up = factors[name][0][expert], factors[name][1][expert]
        dropped = F.dropout(hidden, self.lora_dropout, self.training).to(down.dtype)
        return output + (F.linear(F.linear(dropped, down), up) * self.lora_scale).to(output.dtype)


def stock_experts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Name and module of every set of fused experts as transformers builds it and `FusedExperts` can stand in for."""
    for name, module in model.named_modules():
        weights = [module._parameters.get(matrix) for matrix in MATRICES]
        if isinstance(module, FusedExperts) or any(weight is None or weight.ndim != 3 for weight in weights):
            continue
        plain = not any(getattr(module, flag, True) for flag in ("has_bias", "is_transposed", "has_post_expert_norm"))
        gated = getattr(module, "has_gate", False) and getattr(module, "is_concatenated", False)
        if plain and gated and getattr(module._apply_gate, "__name__", "") == "_default_apply_gate":
            yield name, module


def replace_experts(model: nn.Module, *, to_pack: bool = False) -> int:
    """The number of layers whose experts now are `FusedExperts`, with the same parameters or with empty ones that wait to be packed."""
    from bitsandbytes.nn import Params4bit

    found = list(stock_experts(model))
    for name, module in found:
        weights: list[Any] = [getattr(module, matrix) for matrix in MATRICES]
        if to_pack and any(weight[0].numel() % BLOCK for weight in weights):
            raise UserError(f"llm.quantization=4bit needs experts whose size is a multiple of {BLOCK}; set llm.quantization=none")
        if to_pack:
            weights = [Params4bit(weight.data, requires_grad=False, quant_type="nf4") for weight in weights]
        model.set_submodule(name, FusedExperts(weights[0], weights[1], cast(nn.Module, module.act_fn)).train(module.training))
    return len(found)


def fused_experts(model: nn.Module) -> list[FusedExperts]:
    """The experts of each layer that has any, first layer first."""
    return [module for module in model.modules() if isinstance(module, FusedExperts)]


def is_router(model: nn.Module, name: str, module: nn.Module) -> bool:
    """Whether the module chooses or weighs experts: by its class, or by its name and the number of its outputs."""
    if "router" in type(module).__name__.lower():
        return True
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    counts = [getattr(text, key, None) for key in EXPERT_COUNTS]
    experts = [count for count in counts if isinstance(count, int) and count > 0]
    leaf = name.rsplit(".", 1)[-1]
    return bool(experts) and leaf in ("gate", "router", "shared_expert_gate") and getattr(module, "out_features", None) in (*experts, 1)


def add_expert_lora(model: nn.Module, lora: LoraConfig) -> int:
    """The number of layers whose experts now have adapters, a pair of factors for each expert and matrix, in float32.

    Source: Hu et al., https://arxiv.org/abs/2106.09685.

    Args:
        model: Changed in place; experts may be packed or not. Call peft first, as it freezes what it did not make.
        lora: Settings of the adapters.

    Raises:
        UserError: The model has no experts.
    """
    replace_experts(model)
    layers = fused_experts(model)
    if not layers:
        raise UserError("tuning.lora.use_experts=true, but the language model has no experts; set it to false")
    for experts in layers:
        experts.add_lora(lora.rank, lora.alpha / (lora.rank**0.5 if lora.use_rslora else lora.rank), lora.dropout)
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
