"""Tensors that claim to be on `cuda:0` but compute on the CPU, which reveal device errors and syncs without a GPU.

PyTorch's core sees CPU tensors, because a CPU build has no streams for its autograd; Python code sees `cuda:0`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map_only

CUDA, CPU = torch.device("cuda:0"), torch.device("cpu")

# Operations that a GPU answers only when it has done all work before them, as the host needs their values or the size
# of their result.
_WAITS = {
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "equal",
    "is_nonzero",
    "bincount",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
}
_TAKES_NO_SCALARS = {
    "cat",
    "stack",
    "index_select",
    "gather",
    "scatter",
    "masked_scatter",
    "embedding",
    "mm",
    "addmm",
    "bmm",
}


class DeviceMixError(RuntimeError):
    """An operation got tensors of the GPU and of the CPU."""


class ClaimedTensor(Tensor):
    """A tensor of the CPU that claims to be on `cuda:0`.

    Args:
        held: The tensor that computes.
    """

    held: Tensor
    device = property(lambda self: CUDA)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_cpu = property(lambda self: False)  # type: ignore[assignment]
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls: type[ClaimedTensor], held: Tensor) -> ClaimedTensor:
        """Wraps a plain tensor."""
        made: ClaimedTensor = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype
        )
        made.held = held
        return made

    def __repr__(self, **_: Any) -> str:
        return f"claimed({self.held!r})"

    def get_device(self) -> int:
        """The index of the GPU."""
        return 0

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Computes on the held tensors, after a look at the devices."""
        kwargs = kwargs or {}
        tensors = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, Tensor)]
        _check(func, args, tensors)
        _count(func, args, kwargs)
        wrappers = {id(value.held): value for value in tensors if isinstance(value, ClaimedTensor)}
        inner_args, inner_kwargs = tree_map_only(ClaimedTensor, lambda value: value.held, (args, kwargs))
        out = _histogram(*inner_args, **inner_kwargs) if _name(func) == "histc" else func(*inner_args, **inner_kwargs)
        return tree_map_only(
            Tensor, lambda value: wrappers.get(id(value)) if id(value) in wrappers else ClaimedTensor(value), out
        )


def _histogram(values: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """A GPU counts integers too, which the CPU does as floats."""
    return torch.histc(values.float(), *args, **kwargs).to(values.dtype)


waits: Counter[str] = Counter()
"""Waits of the host since they were last cleared, by the operation."""


def _name(func: Any) -> str:
    return str(func.overloadpacket.__name__)


def _check(func: Any, args: Any, tensors: list[Tensor]) -> None:
    """`DeviceMixError` for what CUDA refuses.

    A CPU tensor that is no scalar, but for indices of a tensor of the GPU and copies.
    """
    name = _name(func)
    if name in ("copy_", "_to_copy"):
        return
    unclaimed = [value for value in tensors if not isinstance(value, ClaimedTensor)]
    if name in ("index", "index_put", "index_put_", "_index_put_impl_") and isinstance(args[0], ClaimedTensor):
        unclaimed = [value for value in unclaimed if not any(value is index for index in args[1])]
    refused = [value for value in unclaimed if value.ndim or name.rstrip("_") in _TAKES_NO_SCALARS]
    if (
        name in ("cat", "stack", "index_put") and torch._C._current_graph_task_id() != -1
    ):  # zeros for a missing gradient, which the core made
        refused = [value for value in refused if value.any()]
    if refused:
        raise DeviceMixError(f"{func} got a CPU tensor of shape {tuple(refused[0].shape)} beside tensors of {CUDA}")


def _count(func: Any, args: Any, kwargs: Any) -> None:
    name = _name(func)
    if name in _WAITS or (name == "repeat_interleave" and kwargs.get("output_size") is None):
        waits[name] += 1
    if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
        given = [index for index in args[1] if index is not None]
        is_fill = name != "index" and args[2].numel() == 1 and len(given) == 1  # becomes masked_fill
        if any(index.dtype == torch.bool for index in given) and not is_fill:
            waits["boolean index"] += 1
        waits["upload"] += sum(not isinstance(index, ClaimedTensor) for index in given)
    if name == "copy_" and isinstance(args[0], ClaimedTensor) != isinstance(args[1], ClaimedTensor):
        waits["upload" if isinstance(args[0], ClaimedTensor) else "download"] += 1


class _Move(torch.autograd.Function):
    """A copy on the other device, with gradients on the first."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        """A copy."""
        return tensor.held.clone() if isinstance(tensor, ClaimedTensor) else ClaimedTensor(tensor.clone())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        """The way back."""
        return _Move.forward(None, gradients[0])


class _ClaimedMode(TorchFunctionMode):
    """Moves and makes tensors where Python code names `cuda:0`."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        special = _MOVES.get(func)
        if special is not None:
            return special(*args, **kwargs)
        if func is torch.tensor:  # the core reads single numbers of a list from the memory of their tensors
            args = tree_map_only(ClaimedTensor, lambda value: value if value.ndim else value.item(), args)
        wanted = kwargs.get("device")
        if wanted is None or torch.device(wanted).type == "cpu":
            return func(*args, **kwargs)
        if torch.device(wanted).type == "meta":
            return func(*args, **kwargs)
        if func in (torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor):
            if args and isinstance(args[0], ClaimedTensor):
                return args[0].to(kwargs.get("dtype", args[0].dtype))
            waits["upload"] += 1  # from memory that is not pinned
        out = func(*args, **{**kwargs, "device": CPU})
        return tree_map_only(
            Tensor, lambda value: value if isinstance(value, ClaimedTensor) else ClaimedTensor(value), out
        )


def _to(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if args and isinstance(args[0], Tensor):
        args = (args[0].device, args[0].dtype, *args[1:])
    if isinstance(other := kwargs.pop("other", None), Tensor):
        kwargs |= {"device": other.device, "dtype": other.dtype}
    is_copied = kwargs.pop("copy", False)
    device, dtype, non_blocking, memory_format = torch._C._nn._parse_to(*args, **kwargs)
    if device is not None and device.type == "meta":
        return torch.empty_like(tensor, device="meta")
    if device is not None and device.type != tensor.device.type:
        if device.type == "cpu":
            waits["download"] += 1
        elif not non_blocking:
            waits["upload"] += 1
        tensor = _Move.apply(tensor)  # type: ignore[assignment]
    layout = {} if memory_format is None else {"memory_format": memory_format}
    return Tensor.to(tensor, dtype=dtype or tensor.dtype, copy=is_copied, **layout)


def _tolist(tensor: Tensor) -> Any:
    if not isinstance(tensor, ClaimedTensor):
        return Tensor.tolist(tensor)
    waits["tolist"] += 1
    return tensor.held.tolist()


def _numpy(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
    if isinstance(tensor, ClaimedTensor):
        raise DeviceMixError(f"a tensor of {CUDA} cannot become an array; copy it to the host first")
    return Tensor.numpy(tensor, *args, **kwargs)


def _pad_sequence(sequences: Any, *args: Any, **kwargs: Any) -> Tensor:
    """The core makes its result by the device that it sees."""
    if not isinstance(sequences[0], ClaimedTensor):
        return torch._C._nn.pad_sequence(sequences, *args, **kwargs)
    return ClaimedTensor(torch._C._nn.pad_sequence([sequence.held for sequence in sequences], *args, **kwargs))


_MOVES: dict[Any, Callable[..., Any]] = {
    torch._C._nn.pad_sequence: _pad_sequence,
    Tensor.to: _to,
    Tensor.cpu: lambda tensor, **_: _to(tensor, CPU),
    Tensor.cuda: lambda tensor, *_, **kwargs: _to(tensor, CUDA, non_blocking=kwargs.get("non_blocking", False)),
    Tensor.tolist: _tolist,
    Tensor.numpy: _numpy,
    Tensor.__array__: _numpy,
    Tensor.new_tensor: lambda tensor, *args, **kwargs: torch.tensor(
        *args, **{"dtype": tensor.dtype, "device": tensor.device, **kwargs}
    ),
}


@contextmanager
def claimed_device() -> Iterator[Counter[str]]:
    """`cuda:0` exists for Python code inside; gives the counts of `waits`."""
    start, enabled, chosen = torch.autocast.__init__, torch.is_autocast_enabled, torch.get_autocast_dtype
    back = BackwardCFunction.apply

    def on_host(kind: str | None) -> str | None:
        return "cpu" if kind == "cuda" else kind

    def backward(self: Any, *gradients: Any) -> Any:
        with _ClaimedMode():  # autograd leaves the mode of the caller
            return back(self, *gradients)

    waits.clear()
    with pytest.MonkeyPatch.context() as patch, _ClaimedMode():
        patch.setattr(
            torch.autocast, "__init__", lambda self, device_type, *a, **k: start(self, on_host(device_type), *a, **k)
        )
        patch.setattr(torch, "is_autocast_enabled", lambda kind="cuda": enabled(on_host(kind)))
        patch.setattr(torch, "get_autocast_dtype", lambda kind: chosen(on_host(kind)))
        patch.setattr(BackwardCFunction, "apply", backward)
        patch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
        yield waits


def claim(module: nn.Module) -> None:
    """Puts parameters and buffers on `cuda:0`, as `Module.to` does.

    Shared ones stay shared, other attributes stay where they are.
    """
    moved: dict[int, Any] = {}
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                if id(parameter) not in moved:
                    moved[id(parameter)] = _claimed_parameter(parameter)
                part._parameters[name] = moved[id(parameter)]
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = moved.setdefault(id(buffer), ClaimedTensor(buffer))


def _claimed_parameter(parameter: nn.Parameter) -> nn.Parameter:
    claimed = nn.Parameter(ClaimedTensor(parameter.detach().as_subclass(Tensor)), requires_grad=parameter.requires_grad)
    state: Any = getattr(parameter, "quant_state", None)
    if state is not None:  # packed by bitsandbytes
        for one in (state, state.state2):
            for key in ("absmax", "code", "offset"):
                if isinstance(value := getattr(one, key, None), Tensor):
                    setattr(one, key, ClaimedTensor(value))
        for key, value in vars(parameter).items():
            setattr(claimed, key, value)
    return claimed
