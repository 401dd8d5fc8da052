"""Models at true size without weights: fake tensors have shapes and dtypes but take no memory."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from vlmcap.models.llm.experts import BLOCK, SCALE_BLOCK, FusedExperts, replace_experts
from vlmcap.planning.estimate.live_bytes import add_launches

# Kernels that unpack the experts' 4-bit weights: scales, their offset, weights. Those of linear layers are one kernel.
_UNPACK_KERNELS = 3
_INT8_KERNELS = 2  # beside the product: quantise the input, dequantise the output


def fill_with_fake_tensors(module: nn.Module, mode: FakeTensorMode) -> None:
    """Replaces the meta tensors of a module by fake CPU tensors; shared tensors stay shared."""
    replaced: dict[int, Any] = {}  # id of a meta tensor -> its fake tensor
    with mode:
        for child in module.modules():
            for tensors in (child._parameters, child._buffers):
                for name, tensor in tensors.items():
                    if tensor is None:
                        continue
                    if id(tensor) not in replaced:
                        # Strides stay, because some kernels depend on the layout.
                        empty: Any = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
                        replaced[id(tensor)] = (
                            nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
                        )
                        _copy_quantization_attributes(tensor, replaced[id(tensor)])
                    tensors[name] = replaced[id(tensor)]


def _copy_quantization_attributes(old: Any, new: Any) -> None:
    for name in ("compress_statistics", "quant_type"):
        if hasattr(old, name):
            setattr(new, name, getattr(old, name))


def quantize_fake(model: nn.Module, quantization: str, dtype: torch.dtype, kept: set[str] | None = None) -> None:
    """Replaces the linear layers of a meta model by quantised ones without weights, as bitsandbytes would.

    Args:
        model: Model that is changed in place.
        quantization: "none", "8bit" or "4bit".
        dtype: Data type of the arithmetic.
        kept: Names of layers that are not quantised; None takes transformers' default (the head).
    """
    from transformers.quantizers.base import get_keys_to_not_convert

    replace_experts(model, to_pack=quantization == "4bit")
    for experts in [module for module in model.modules() if isinstance(module, FusedExperts)]:  # quantised or not
        _fake_experts(experts, quantization == "4bit", dtype)
    if quantization == "none":
        return
    kept = set(get_keys_to_not_convert(model)) if kept is None else kept
    layer_class = _FakeLinear4bit if quantization == "4bit" else _FakeLinear8bit
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and name not in kept:
            model.set_submodule(name, layer_class(module, dtype))
    setattr(model, f"is_loaded_in_{quantization}", True)  # peft reads it


def emulate_checkpoint_offload(model: nn.Module) -> None:
    """Makes inputs of checkpointed layers take no memory until the backward pass, as if they were in host memory.

    `save_on_cpu`, which offloads them in training, does nothing to fake tensors, as these are on the CPU already.
    """
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            cast(Any, module)._gradient_checkpointing_func = _offloaded_checkpoint


def _offloaded_checkpoint(function: Any, *inputs: Any) -> Any:
    # Only shape and dtype are kept, so that the tensor itself can be freed.
    def pack(tensor: Tensor) -> tuple[torch.Size, torch.dtype]:
        return tensor.shape, tensor.dtype

    def unpack(packed: tuple[torch.Size, torch.dtype]) -> Tensor:
        return torch.empty(packed[0], dtype=packed[1])

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        return checkpoint(function, *inputs, use_reentrant=False)


def packed_sizes(count: int) -> tuple[int, int]:
    """Returns the bytes of `count` weights in NF4 with double quantisation, and of their scales."""
    scales = -(-count // BLOCK)
    return -(-count // 2), scales + 4 * -(-scales // SCALE_BLOCK)


class _FakeLinear4bit(Linear4bit):  # type: ignore[misc]
    """Emulates bitsandbytes' 4-bit layer, which unpacks its weight in both passes and keeps no unpacked copy."""

    bias: Any

    def __init__(self, linear: nn.Linear, dtype: torch.dtype) -> None:
        with torch.device("meta"):
            super().__init__(
                linear.in_features, linear.out_features, linear.bias is not None, compute_dtype=dtype, quant_type="nf4"
            )
            packed, scales = packed_sizes(linear.weight.numel())
            weight: Any = _frozen_bytes(packed)
            weight.compress_statistics, weight.quant_type = True, "nf4"
            self.weight = weight
            self.register_buffer("quantization_state", torch.empty(scales, dtype=torch.uint8))
            self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        # bitsandbytes computes in its own dtype, whatever that of the input is.
        wide = x.to(cast(torch.dtype, self.compute_dtype))
        out: Tensor = _UnpackedLinear.apply(wide, self.out_features, False)
        bias = None if self.bias is None else self.bias.to(out.dtype)
        return (out if bias is None else out + bias).to(x.dtype)


class _FakeLinear8bit(Linear8bitLt):  # type: ignore[misc]
    """Emulates bitsandbytes' 8-bit layer: int8 products of an int8 copy of the input; backward unpacks the weight."""

    bias: Any

    def __init__(self, linear: nn.Linear, dtype: torch.dtype) -> None:
        with torch.device("meta"):
            super().__init__(
                linear.in_features, linear.out_features, linear.bias is not None, has_fp16_weights=False, threshold=6.0
            )
            self.weight = _frozen_bytes(linear.weight.numel())
            self.register_buffer("quantization_state", torch.empty(linear.out_features, dtype=torch.float32))
            self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        # bitsandbytes' 8-bit product takes 16-bit input.
        narrow = x.to(torch.float16) if x.dtype == torch.float32 else x
        out: Tensor = _UnpackedLinear.apply(narrow, self.out_features, True)
        return (out if self.bias is None else out + self.bias).to(x.dtype)


def _frozen_bytes(count: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(count, dtype=torch.uint8, device="meta"), requires_grad=False)


class _UnpackedLinear(torch.autograd.Function):
    """x W^T, where W (out, in) is unpacked for the product and not kept."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, out_dim: int, is_8bit: bool) -> Tensor:
        ctx.shape, ctx.dtype = (out_dim, hidden.shape[-1]), hidden.dtype
        if is_8bit:
            add_launches(_INT8_KERNELS)
            # Alive only for a moment, but long enough to count at a peak.
            _ = torch.empty_like(hidden, dtype=torch.int8)  # the quantised input
            _ = hidden.new_empty(*hidden.shape[:-1], out_dim, dtype=torch.int32)  # the product before its scales
        return F.linear(hidden, hidden.new_empty(ctx.shape))  # (..., in) -> (..., out)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        gradient = gradients[0].to(ctx.dtype)
        return gradient @ gradient.new_empty(ctx.shape), None, None


def _fake_experts(experts: FusedExperts, is_packed: bool, dtype: torch.dtype) -> None:
    for name, shape in experts.shapes.items():
        count = int(torch.Size(shape).numel())
        if is_packed:
            packed, scales = packed_sizes(count)
            setattr(experts, name, _frozen_bytes(packed))
            experts.register_buffer(f"{name}_quantization_state", torch.empty(scales, dtype=torch.uint8, device="meta"))
    experts.__class__ = _FakeExperts
    cast(Any, experts).fake_dtype = dtype
    cast(Any, experts).fakes_packing = is_packed


class _FakeExperts(FusedExperts):
    """Experts that allocate unpacked weights without having packed ones."""

    fake_dtype: torch.dtype
    fakes_packing: bool

    @property
    def is_packed(self) -> bool:
        return self.fakes_packing

    @property
    def compute_dtype(self) -> torch.dtype:
        return self.fake_dtype

    def _is_frozen(self, name: str) -> bool:
        return self.is_packed

    def _unpack(self, name: str, dtype: torch.dtype, experts: Tensor | None) -> Tensor:
        if not self.is_packed:
            return super()._unpack(name, dtype, experts)
        add_launches(_UNPACK_KERNELS)
        count, *shape = self.shapes[name]
        count = count if experts is None else len(experts)
        scales = torch.empty(count * math.prod(shape) // BLOCK, dtype=torch.float32)  # alive while weights are unpacked
        matrices = torch.empty(count, *shape, dtype=dtype)
        del scales
        return matrices
