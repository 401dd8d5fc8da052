"""Experts of a mixture-of-experts language model, with 4-bit packing and adapters.

transformers fuses the experts of a layer into two parameters. bitsandbytes and peft support linear layers only, so they
neither quantise nor adapt fused experts.

Legend: N tokens, K experts per token, S = N · K pairs of a token and an expert, E experts, M matrices (of all experts,
or one per pair), H hidden size, I intermediate size of an expert, R adapter rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmcap.config import LoraConfig
from vlmcap.errors import UserError

if TYPE_CHECKING:
    from bitsandbytes.nn import Params4bit

MATRICES = ("gate_up_proj", "down_proj")  # (E, 2 I, H) and (E, H, I)
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")  # names of E in configurations
BLOCK = 64  # weights that share a scale
SCALE_BLOCK = 256  # scales that share a scale of their own
_DENSE_TOKENS = 64  # up to this many tokens, running all experts costs less than the memory traffic of their weights
_ALIGNED = 8  # elements: grouped products need rows of a multiple of 16 bytes


def pack_experts(weight: Tensor) -> Params4bit:
    """Quantises the experts' weights to NF4 with double quantisation, bit-identical to bitsandbytes.

    Experts are quantised one at a time, because the CPU kernel needs several times the memory of its input.

    Args:
        weight: (E, out, in), where out x in is a multiple of 64, so that no scale is shared by two experts.

    Source: Dettmers et al., "QLoRA", https://arxiv.org/abs/2305.14314.
    """
    from bitsandbytes.functional import QuantState, quantize_4bit, quantize_blockwise
    from bitsandbytes.nn import Params4bit

    assert weight[0].numel() % BLOCK == 0, "replace_experts refuses other sizes"
    packed, scales = [], []
    # Expert by expert, so that a contiguous copy is made of one at a time.
    for expert in weight:
        bits, state = quantize_4bit(expert.contiguous(), blocksize=BLOCK, quant_type="nf4")
        packed.append(bits)
        scales.append(state.absmax)
    scale = torch.cat(scales)
    # bitsandbytes' double quantisation: the scales minus their mean are quantised to 8 bits themselves.
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
    return Params4bit(
        bits, requires_grad=False, quant_state=state, blocksize=BLOCK, quant_type="nf4", bnb_quantized=True
    )


def is_packed(weight: Tensor) -> bool:
    """Returns whether the weights are packed 4-bit numbers with a quantisation state."""
    return weight.dtype == torch.uint8 and getattr(weight, "quant_state", None) is not None


def unpack_experts(weight: Params4bit, dtype: torch.dtype, experts: Tensor | None = None) -> Tensor:
    """Unpacks the result of `pack_experts` with one kernel call, without synchronisation.

    Args:
        weight: Packed weights of E experts.
        dtype: Dtype of the result.
        experts: int64 (S,), experts to unpack, with repetitions; None for all.

    Returns:
        The matrices (M, out, in).
    """
    from bitsandbytes.functional import QuantState, dequantize_4bit, dequantize_blockwise

    state, bits = weight.quant_state, weight.detach().as_subclass(Tensor)
    num_experts, *shape = state.shape
    if experts is None:
        scale = dequantize_blockwise(state.absmax, state.state2)
    else:
        # Only the scales of these experts are unpacked: those of all experts would be half of a token's memory traffic.
        absmax = state.absmax.view(num_experts, -1)[experts]  # (E · blocks,) -> (S, blocks)
        indices = experts[:, None] * absmax.shape[1] + torch.arange(absmax.shape[1], device=absmax.device)
        scale = (state.state2.code[absmax.int()] * state.state2.absmax[indices // SCALE_BLOCK]).flatten()
        bits = bits.view(num_experts, -1)[experts].view(-1, 1)  # (E · bytes, 1) -> (S · bytes, 1)
    whole = torch.Size((num_experts if experts is None else len(experts), *shape))
    scale.add_(state.offset)
    one = QuantState(
        absmax=scale, shape=whole, dtype=dtype, blocksize=BLOCK, code=state.code, quant_type=state.quant_type
    )
    return dequantize_4bit(bits, one)


def _product(rows: Tensor, matrices: Tensor, offsets: Tensor | None) -> Tensor:
    """Multiplies rows by their matrices.

    Args:
        rows: (M, n, in), n rows per matrix; or (S, in), rows sorted by matrix.
        matrices: (M, in, out).
        offsets: int32 (M,), ends of each matrix's rows in (S, in); None for rows (M, n, in).
    """
    # (M, rows, in) × (M, in, out), one matrix for each group of rows of equal number
    if offsets is None:
        return torch.bmm(rows, matrices)
    # (rows, in) × (E, in, out): rows up to offsets[e] belong to expert e
    return F.grouped_mm(rows, matrices, offs=offsets)


class _PackedLinear(torch.autograd.Function):
    """Computes x W^T with packed W, which is unpacked again in backward, so that autograd saves no tensor."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, offsets: Tensor | None, unpack: Callable[[], Tensor]) -> Tensor:
        ctx.unpack, ctx.offsets, ctx.dtype = unpack, offsets, rows.dtype
        # (M, out, in) -> (M, in, out)
        return _product(rows, unpack().transpose(1, 2), offsets)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        # Under autocast, the output and thus its gradient may have another dtype than the input.
        # The gradient of x W^T is g W, so the matrices are not transposed here.
        return _product(gradients[0].to(ctx.dtype), ctx.unpack(), ctx.offsets), None, None


def waits_for_groups(device: torch.device, dtype: torch.dtype) -> bool:
    """Returns whether PyTorch lacks a kernel for grouped products, so that the host waits for group sizes and loops.

    Source: `_grouped_mm_cuda` in PyTorch's GroupedBlas.cpp, whose kernel supports bfloat16 on compute capabilities 9
    and 10.
    """
    return device.type == "cuda" and (
        dtype is not torch.bfloat16 or torch.cuda.get_device_capability(device)[0] not in (9, 10)
    )


class FusedExperts(nn.Module):
    """SwiGLU experts that unpack and multiply all required matrices of a layer at once.

    The number of tokens decides which matrices are unpacked, so that the host never waits for the router. Fewer than E
    pairs, as in decoding a few captions, unpack the matrices of their own experts. Otherwise all matrices are unpacked,
    which a training batch uses anyway, one kind at a time: for Qwen3-30B-A3B, 0.75 GiB of `gate_up_proj` in 16 bits and
    0.38 GiB of `down_proj`. Rows are multiplied by one grouped product. Without a kernel for it, the few tokens of a
    decoding step go through all experts instead.

    Args:
        gate_up_proj: (E, 2 I, H). While a model is loaded in 4 bits it is empty, and the result of `pack_experts`
            replaces it.
        down_proj: (E, H, I), likewise.
        act_fn: Activation function of the gate.
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
        """Whether all weights are stored in 4 bits."""
        return all(is_packed(getattr(self, name)) for name in MATRICES)

    @property
    def compute_dtype(self) -> torch.dtype:
        """Dtype of the weights before packing."""
        return cast(torch.dtype, getattr(self.gate_up_proj, "quant_state", self.gate_up_proj).dtype)

    def add_lora(self, rank: int, scale: float, dropout: float) -> None:
        """Adds adapters in float32 to both matrices of every expert; they have no effect until they are trained."""
        self.lora_scale, self.lora_dropout = scale, dropout
        device = self.gate_up_proj.device
        for name, (experts, out_dim, in_dim) in self.shapes.items():
            bound = in_dim**-0.5  # of Kaiming's uniform initialisation with a = sqrt(5), like peft
            self.lora_A[name] = nn.Parameter(torch.empty(experts, rank, in_dim, device=device).uniform_(-bound, bound))
            self.lora_B[name] = nn.Parameter(torch.zeros(experts, out_dim, rank, device=device))

    # torch.compile supports grouped products in bfloat16 only, and cannot trace the kernels that unpack weights.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Returns the weighted sum (N, H) of the routed experts' outputs, in the dtype of the input.

        Args:
            hidden_states: (N, H).
            top_k_index: (N, K), experts of each token.
            top_k_weights: (N, K).
        """
        num_tokens, top_k = top_k_index.shape
        device, dtype = hidden_states.device, _autocast_dtype(hidden_states) or self.compute_dtype
        if top_k_index.numel() < self.num_experts:
            # Few pairs: one matrix per pair.
            rows = hidden_states[:, None].expand(-1, top_k, -1).flatten(0, 1)  # (N, H) -> (S, H)
            # (S, 1, H) -> (N, K, 1, H) -> (N, K, H)
            outputs = self._run(rows[:, None], top_k_index.flatten(), None).unflatten(0, (-1, top_k)).squeeze(2)
        elif num_tokens <= _DENSE_TOKENS and waits_for_groups(device, dtype) and not torch.is_grad_enabled():
            # Few tokens without a grouped kernel: all tokens go through all experts.
            every = self._run(hidden_states.expand(self.num_experts, -1, -1), None, None)  # (E, N, H)
            # (E, N, H) -> (N, K, H)
            outputs = every[top_k_index, torch.arange(num_tokens, device=device)[:, None]]
        else:
            # Many tokens: pairs are sorted by expert for a grouped product.
            # Stable, so that equal runs give equal sums.
            chosen, order = top_k_index.flatten().sort(stable=True)
            experts = torch.arange(self.num_experts, device=device)
            # (E,): for each expert, the number of pairs up to its last one
            offsets = torch.searchsorted(chosen, experts, right=True, out_int32=True)
            # `order // top_k` is the token of each pair; `argsort` brings the outputs back to the order of the pairs.
            outputs = self._run(hidden_states[order // top_k], None, offsets)[order.argsort()].unflatten(0, (-1, top_k))
        return (outputs * top_k_weights[..., None]).sum(1).to(hidden_states.dtype)  # (N, K, H) -> (N, H)

    def _run(self, rows: Tensor, experts: Tensor | None, offsets: Tensor | None) -> Tensor:
        """Runs experts on rows in the layout of `_product`.

        Args:
            rows: (M, n, H) or (S, H).
            experts: int64 (M,), experts of the matrices; None for all in order.
            offsets: As for `_product`.
        """
        # (…, 2 I) -> twice (…, I)
        gate, up = self._linear("gate_up_proj", rows, experts, offsets).chunk(2, dim=-1)
        return self._linear("down_proj", self.act_fn(gate) * up, experts, offsets)

    def _linear(self, name: str, rows: Tensor, experts: Tensor | None, offsets: Tensor | None) -> Tensor:
        autocast = _autocast_dtype(rows)
        dtype = autocast or self.compute_dtype
        rows = rows.to(dtype)
        if self._is_frozen(name):
            output = _PackedLinear.apply(rows, offsets, partial(self._unpack, name, dtype, experts))
        else:
            output = _product(rows, self._unpack(name, dtype, experts).transpose(1, 2), offsets)
        if name not in self.lora_A:
            return cast(Tensor, output)
        down, up = (
            factors[name] if experts is None else factors[name][experts] for factors in (self.lora_A, self.lora_B)
        )
        if padding := -down.shape[1] % _ALIGNED:  # zero rows and columns do not change the product
            down, up = F.pad(down, (0, 0, 0, padding)), F.pad(up, (0, padding))
        down, up = down.to(autocast or down.dtype), up.to(autocast or up.dtype)
        dropped = F.dropout(rows, self.lora_dropout, self.training).to(down.dtype)
        low = _product(dropped, down.transpose(1, 2), offsets)  # (…, in) -> (…, R)
        return output + (_product(low, up.transpose(1, 2), offsets) * self.lora_scale).to(output.dtype)

    def _is_frozen(self, name: str) -> bool:
        """Returns whether autograd saves nothing for a product with these matrices."""
        return is_packed(getattr(self, name))

    def _unpack(self, name: str, dtype: torch.dtype, experts: Tensor | None) -> Tensor:
        """Returns the matrices (M, out, in) of some experts, or of all."""
        weight = getattr(self, name)
        if is_packed(weight):
            return unpack_experts(weight, dtype, experts)
        chosen: Tensor = weight if experts is None else weight[experts]
        return chosen.to(dtype)


def _autocast_dtype(rows: Tensor) -> torch.dtype | None:
    """Returns the autocast dtype; None without autocast. Grouped products do not support autocast themselves."""
    kind = rows.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def stock_experts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yields name and module of each fused experts module of transformers that `FusedExperts` can replace."""
    for name, module in model.named_modules():
        weights = [module._parameters.get(matrix) for matrix in MATRICES]
        if isinstance(module, FusedExperts) or any(weight is None or weight.ndim != 3 for weight in weights):
            continue
        # Missing flags count as set, so that a class of another version is rather left alone than computed wrongly.
        plain = not any(getattr(module, flag, True) for flag in ("has_bias", "is_transposed", "has_post_expert_norm"))
        gated = getattr(module, "has_gate", False) and getattr(module, "is_concatenated", False)
        if plain and gated and getattr(module._apply_gate, "__name__", "") == "_default_apply_gate":
            yield name, module


def replace_experts(model: nn.Module, *, to_pack: bool = False) -> int:
    """Replaces experts by `FusedExperts` and returns the number of replaced layers.

    Args:
        model: Language model, modified in place.
        to_pack: Whether the parameters become empty 4-bit ones, which loading fills; otherwise they are kept.

    Raises:
        UserError: The size of an expert cannot be packed.
    """
    from bitsandbytes.nn import Params4bit

    experts = list(stock_experts(model))
    for name, module in experts:
        weights: list[Any] = [getattr(module, matrix) for matrix in MATRICES]
        if to_pack and any(weight[0].numel() % BLOCK for weight in weights):
            raise UserError(
                f"llm.quantization=4bit needs experts with a multiple of {BLOCK} weights; set llm.quantization=none"
            )
        if to_pack:
            # Placeholders: the weights are packed one by one while they are loaded.
            weights = [Params4bit(weight.data, requires_grad=False, quant_type="nf4") for weight in weights]
        model.set_submodule(
            name, FusedExperts(weights[0], weights[1], cast(nn.Module, module.act_fn)).train(module.training)
        )
    return len(experts)


def fused_experts(model: nn.Module) -> list[FusedExperts]:
    """Returns the experts of all layers, in order."""
    return [module for module in model.modules() if isinstance(module, FusedExperts)]


def is_router(model: nn.Module, name: str, module: nn.Module) -> bool:
    """Returns whether a module is a router, judged by its class, or by its name and number of outputs."""
    if "router" in type(module).__name__.lower():
        return True
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    counts = [getattr(text, key, None) for key in EXPERT_COUNTS]
    experts = [count for count in counts if isinstance(count, int) and count > 0]
    leaf = name.rsplit(".", 1)[-1]
    return (
        bool(experts)
        and leaf in ("gate", "router", "shared_expert_gate")
        and getattr(module, "out_features", None) in (*experts, 1)
    )


def add_expert_lora(model: nn.Module, lora: LoraConfig) -> int:
    """Adds LoRA (Hu et al., https://arxiv.org/abs/2106.09685) in float32 to each matrix of each expert.

    Args:
        model: Language model with packed or unpacked experts, modified in place. peft must have been applied before, as
            it freezes all other parameters.
        lora: Settings of the adapters.

    Returns:
        The number of layers with adapted experts.

    Raises:
        UserError: The model has no experts.
    """
    replace_experts(model)
    layers = fused_experts(model)
    if not layers:
        raise UserError("tuning.lora.use_experts=true, but the language model has no experts; set it to false")
    for experts in layers:
        # Rank-stabilised LoRA divides by the square root of the rank.
        experts.add_lora(lora.rank, lora.alpha / (lora.rank**0.5 if lora.use_rslora else lora.rank), lora.dropout)
    return len(layers)


@torch.no_grad()
def merge_expert_lora(model: nn.Module) -> int:
    """Merges the adapters of experts, removes them, and returns the number of merged layers.

    Raises:
        UserError: The experts are in 4 bits, where rounding would remove the effect of the adapters.
    """
    layers = [experts for experts in fused_experts(model) if len(experts.lora_A)]
    if any(experts.is_packed for experts in layers):
        raise UserError(
            "adapters on experts cannot be merged into 4-bit weights; load the base checkpoint with "
            "llm.quantization=none"
        )
    for experts in layers:
        for name in MATRICES:
            weight = getattr(experts, name)
            # One expert at a time, as all deltas of a layer in float32 take twice the memory of its experts.
            for expert in range(experts.num_experts):
                delta = experts.lora_B[name][expert] @ experts.lora_A[name][expert]
                weight[expert] = (weight[expert].float() + experts.lora_scale * delta).to(weight.dtype)
        experts.lora_A, experts.lora_B = nn.ParameterDict(), nn.ParameterDict()
    return len(layers)
