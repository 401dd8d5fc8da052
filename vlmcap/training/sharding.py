"""A captioner cut into shards, one a process, by torch's `fully_shard` (FSDP2).

Each parameter is split along its first dimension and every process keeps one part of it; a block's parameters come
together only while the block computes. Source: Zhao et al., https://arxiv.org/abs/2304.11277.
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
    """Cuts the captioner into shards on `device`, with the weights that the first process holds.

    The units are the blocks of the language model and of the encoder, the projector, and the rest. No process but the
    first needs weights: the others may come with everything on the meta device. Tensors travel one by one, so none ever
    holds the whole model on its device.

    Args:
        captioner: With `encoder`, `projector` and `llm`; its parameters are exchanged, under their names. What requires
            gradients goes on doing so, and the parameters of one unit that do must be of one type.
        mesh: One-dimensional, of all processes.
        device: Of this process.
        dtype: Of the blocks' arithmetic and of what is gathered for it, their gradients being summed in float32; None
            for that of their weights. The projector keeps float32.
    """
    held = _strip_to_meta(captioner)
    weights: dict[str, Any] = {**held} if dist.get_rank() == 0 else {}
    del held
    policy = MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=torch.float32 if dtype else None, cast_forward_inputs=False
    )
    for part in ("encoder", "llm"):
        for block in blocks(getattr(captioner, part)):
            fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(captioner.projector, mesh=mesh)  # type: ignore[arg-type]
    # Gathered anew on the way back, unlike torch's default for a root: embeddings and head are a gigabyte, and stages
    # thaw parameters.
    fully_shard(captioner, mesh=mesh, reshard_after_forward=True)
    for method in _METHODS:
        register_fsdp_forward_method(captioner, method)
    _materialize(captioner, device)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=False)
    set_model_state_dict(captioner, weights, options=options)
    for buffer in captioner.buffers():  # some, such as the frequencies of rotary positions, are in no state
        dist.broadcast(buffer, src=0)


def blocks(part: nn.Module | None) -> list[nn.Module]:
    """The members of the outermost lists of modules with parameters.

    The layers of a transformer, and of each of its parts.
    """
    return [] if part is None else list(_blocks(part))


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from (member for member in child if next(member.parameters(), None) is not None)
        else:
            yield from _blocks(child)


def _strip_to_meta(captioner: nn.Module) -> dict[str, Tensor]:
    """The parameters by name, of which the captioner is left with shapes alone; what is shared stays shared."""
    held = dict(captioner.named_parameters(remove_duplicate=False))
    made: dict[int, nn.Parameter] = {}
    for module in captioner.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in made:
                    empty = torch.empty_like(parameter, device="meta")
                    made[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
                module._parameters[name] = made[id(parameter)]
    return {name: parameter.detach() for name, parameter in held.items() if not parameter.is_meta}


def _materialize(captioner: nn.Module, device: torch.device) -> None:
    """Memory for what is on the meta device, and what is elsewhere moved to `device`."""
    captioner._apply(lambda tensor: torch.empty_like(tensor, device=device) if tensor.is_meta else tensor.to(device))


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor of which each process has a shard, on the CPU; every process must ask for it."""
    gathered: Tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return gathered.detach().cpu()


def as_sharded_like(tensor: Tensor, model: Tensor) -> Tensor:
    """`tensor`, which every process has whole, cut as `model` is and where `model` is."""
    moved = tensor.to(model.device)
    if not isinstance(model, DTensor):
        return moved
    return distribute_tensor(moved, model.device_mesh, model.placements, src_data_rank=None)


def load_whole_weights(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Puts weights that every process has whole into a module, cut into shards or not."""
    named: dict[str, Any] = dict(module.named_parameters())
    with torch.no_grad():
        for name, tensor in weights.items():
            named[name].copy_(as_sharded_like(tensor.to(named[name].dtype), named[name]))
