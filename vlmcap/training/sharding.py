"""Shards a captioner over all processes by torch's `fully_shard` (FSDP2).

Each parameter is split along its first dimension, and every process keeps one shard of it; the parameters of a block
are gathered only while the block computes. Reference: Zhao et al., https://arxiv.org/abs/2304.11277.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

_METHODS = ("with_features", "generate")  # entry points of a captioner besides `forward`


def shard_captioner(captioner: nn.Module, mesh: DeviceMesh, device: torch.device, dtype: torch.dtype | None) -> None:
    """Shards the captioner on `device`, with the weights that the first process holds.

    The units are the blocks of the language model and of the encoder, the projector, and the rest. Only the first
    process needs weights; the other processes may hold everything on the meta device. Tensors are sent one by one, so
    no device ever holds the full model.

    Args:
        captioner: Module with `encoder`, `projector` and `llm`; its parameters are replaced under their names.
            `requires_grad` is kept, and all trained parameters of one unit must have the same dtype.
        mesh: One-dimensional mesh of all processes.
        device: Device of this process.
        dtype: Dtype in which blocks compute and parameters are gathered, while gradients are reduced in float32; None
            uses the dtype of the weights. The projector stays in float32.
    """
    # 1. Take the weights out of the model, so that `fully_shard` allocates nothing.
    stripped = _strip_to_meta(captioner)
    weights: dict[str, Any] = {**stripped} if dist.get_rank() == 0 else {}
    del stripped
    # 2. Divide the model into units, the inner ones first.
    policy = MixedPrecisionPolicy(
        # Weights are gathered in the dtype of autocast, and gradients are summed in float32.
        param_dtype=dtype,
        reduce_dtype=torch.float32 if dtype else None,
        cast_forward_inputs=False,
    )
    for component in ("encoder", "llm"):
        for block in blocks(getattr(captioner, component)):
            fully_shard(block, mesh=mesh, mp_policy=policy)
    # No policy: the projector's weights stay in float32 when they are gathered.
    fully_shard(captioner.projector, mesh=mesh)  # type: ignore[arg-type]
    # Unlike torch's default for a root, gather again in the backward pass: embeddings and head take a gigabyte, and
    # stages change which parameters are trained.
    fully_shard(captioner, mesh=mesh, reshard_after_forward=True)
    for method in _METHODS:
        register_fsdp_forward_method(captioner, method)
    # 3. Allocate the shards, move all other tensors to the device, and fill the shards from the first process.
    # `to_empty` would also discard buffers that hold values; `_apply` sees every tensor by itself.
    captioner._apply(lambda tensor: torch.empty_like(tensor, device=device) if tensor.is_meta else tensor.to(device))
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=False)
    set_model_state_dict(captioner, weights, options=options)
    for buffer in captioner.buffers():  # some, such as the rotary frequencies, are in no state dict
        dist.broadcast(buffer, src=0)


def blocks(component: nn.Module | None) -> list[nn.Module]:
    """Returns the members of the outermost module lists that have parameters, such as the layers of a transformer."""
    return [] if component is None else list(_blocks(component))


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from (member for member in child if next(member.parameters(), None) is not None)
        else:
            # Only the outermost lists: blocks inside of blocks, such as experts, belong to the unit of their layer.
            yield from _blocks(child)


def _strip_to_meta(captioner: nn.Module) -> dict[str, Tensor]:
    """Replaces all parameters by meta parameters and returns the original ones by name; shared ones stay shared."""
    originals = dict(captioner.named_parameters(remove_duplicate=False))
    replaced: dict[int, nn.Parameter] = {}
    for module in captioner.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                # Tied weights, such as embedding and head, must stay one parameter.
                if id(parameter) not in replaced:
                    empty = torch.empty_like(parameter, device="meta")
                    replaced[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
                module._parameters[name] = replaced[id(parameter)]
    return {name: parameter.detach() for name, parameter in originals.items() if not parameter.is_meta}


def gather_full(tensor: Tensor) -> Tensor:
    """Returns the full tensor on the CPU from the shards of all processes; every process must call this function."""
    gathered: Tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return gathered.detach().cpu()


def as_sharded_like(tensor: Tensor, model: Tensor) -> Tensor:
    """Shards a tensor that every process holds in full like `model`, and moves it to the device of `model`."""
    moved = tensor.to(model.device)
    if not isinstance(model, DTensor):
        return moved
    # None: every process cuts its own shard from its own copy, and nothing is sent.
    return distribute_tensor(moved, model.device_mesh, model.placements, src_data_rank=None)


def load_full_weights(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copies weights that every process holds in full into a module, sharded or not."""
    named: dict[str, Any] = dict(module.named_parameters())
    with torch.no_grad():
        for name, tensor in weights.items():
            named[name].copy_(as_sharded_like(tensor.to(named[name].dtype), named[name]))
