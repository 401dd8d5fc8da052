"""Counts the bytes of live tensors and the arithmetic of a step, and emulates on a CPU what CUDA would allocate.

Both work on real and on fake tensors, so that the step of a model of true size is counted without its memory.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry

_aten = torch.ops.aten
# These launch no kernel; views are recognised by their schema.
_NO_KERNEL = {
    _aten.empty,
    _aten.empty_like,
    _aten.empty_strided,
    _aten.new_empty,
    _aten.new_empty_strided,
    _aten._unsafe_view,
}
ROUNDING = 512  # bytes, of which the CUDA allocator hands out multiples


class LiveBytes(TorchDispatchMode):
    """Counts every storage from its creation to its end, under the tag that was set when it was created.

    Attributes:
        tag: Tag of the tensors that are created from now on.
        peaks: Segment name to bytes by tag at the segment's peak.
        flops: Floating-point operations so far; a multiplication and an addition are two.
        launches: Kernels launched so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launches = 0
        self.tag, self.flops = "other", 0.0
        self.peaks: dict[str, Counter[str]] = {}
        self._segment = "start"
        self._live: dict[int, tuple[str, int, Any]] = {}  # address of a storage -> tag, bytes, and what keeps the entry
        self._by_tag: Counter[str] = Counter()
        self._total, self._peak = 0, 0

    def __enter__(self) -> Self:
        _active.append(self)
        return super().__enter__()  # type: ignore[no-any-return]

    def __exit__(self, *error: Any) -> None:
        _active.remove(self)
        super().__exit__(*error)

    def enter(self, segment: str) -> None:
        """Begins a segment; when a segment is entered again, its peak may rise."""
        self._segment = segment
        # A new segment starts below any size, so that its first note counts.
        self._peak = self.peaks[segment].total() if segment in self.peaks else -1
        self._note_peak()

    def snapshot(self) -> Counter[str]:
        """Returns the bytes that are alive now, by tag."""
        # Unary plus drops entries of 0.
        return +Counter(self._by_tag)

    def set_tag(self, tensor: Tensor, tag: str) -> None:
        """Gives a live tensor another tag; a tensor from outside is counted from now on."""
        key = self._key(tensor)
        if key in self._live:
            old, size, reference = self._live[key]
            self._by_tag[old] -= size
            self._by_tag[tag] += size
            self._live[key] = (tag, size, reference)
        else:
            self._add(tensor, tag)

    def exclude(self, tensors: Sequence[Tensor]) -> None:
        """Excludes storages that are counted elsewhere, such as weights."""
        for tensor in tensors:
            self._live.setdefault(self._key(tensor), ("excluded", 0, tensor.untyped_storage()))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._add(tensor, self.tag)
        packet = getattr(func, "_overloadpacket", None)
        # A view launches no kernel.
        if func.namespace == "aten" and packet not in _NO_KERNEL and not func.is_view:
            self.launches += 1
        if packet in flop_registry:
            self.flops += float(flop_registry[packet](*args, **(kwargs or {}), out_val=out))
        return out

    @staticmethod
    def _key(tensor: Tensor) -> int:
        # The address of the storage, which all views of a tensor share.
        return int(tensor.untyped_storage()._cdata)

    def _add(self, tensor: Tensor, tag: str) -> None:
        storage = tensor.untyped_storage()
        key = int(storage._cdata)
        if key in self._live:
            return
        # Rounded up as CUDA's allocator does.
        size = -(-storage.nbytes() // ROUNDING) * ROUNDING
        # The callback runs when the last tensor on this storage is gone.
        self._live[key] = (tag, size, weakref.ref(storage, partial(self._remove, key)))
        self._by_tag[tag] += size
        self._total += size
        self._note_peak()

    def _remove(self, key: int, _: Any) -> None:
        tag, size, _ = self._live.pop(key)
        self._by_tag[tag] -= size
        self._total -= size

    def _note_peak(self) -> None:
        if self._total > self._peak:
            self._peak = self._total
            self.peaks[self._segment] = self.snapshot()


_active: list[LiveBytes] = []


def add_launches(count: int) -> None:
    """Counts kernels that a GPU launches and that are not run here."""
    for live in _active:
        live.launches += count


def tag_module(module: torch.nn.Module, live: LiveBytes, tag: str) -> None:
    """Tags what the module's forward pass creates; tags of modules inside it take precedence."""
    outer: list[str] = []

    def enter(*_: Any) -> None:
        outer.append(live.tag)
        live.tag = tag

    def leave(*_: Any) -> None:
        live.tag = outer.pop()

    module.register_forward_pre_hook(enter)
    module.register_forward_hook(leave, always_call=True)


_FLOAT32_OPS = {  # run in float32 under CUDA's autocast
    F.layer_norm,
    F.softmax,
    F.log_softmax,
    F.cross_entropy,
    F.nll_loss,
    torch.softmax,
    torch.log_softmax,
    torch.pow,
    torch.rsqrt,
    torch.exp,
    torch.log,
    torch.cumsum,
    Tensor.softmax,
    Tensor.log_softmax,
    Tensor.pow,
    Tensor.__pow__,
    Tensor.rsqrt,
    Tensor.exp,
    Tensor.log,
    Tensor.cumsum,
}


class CudaEmulationMode(TorchFunctionMode):
    """Makes functions on fake CPU tensors allocate what they would on a GPU.

    Functions of real tensors (ids, masks, positions) are run, as their values decide on shapes.

    The rules are from PyTorch's sources. Under CUDA's autocast, normalisation, softmax, losses and powers run in
    float32. Scaled dot-product attention is fused: it keeps its inputs, its output and a float32 number per token and
    head; a mask is made additive in the input's dtype; the backward pass takes the gradients of its inputs and a
    float32 copy of the queries' gradient. On GPUs below compute capability 8.0 grouped queries are not fused, with all
    query-key pairs in float32.

    Args:
        live: Counter that the arithmetic of attention is added to.
        has_flash: Whether the GPU has compute capability 8.0 or newer.
    """

    def __init__(self, live: LiveBytes, has_flash: bool = True) -> None:
        super().__init__()
        self.live, self.has_flash = live, has_flash

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self._attend(*args, **kwargs)
        # 1. Replace what fake CPU tensors do not support.
        if func is torch._grouped_mm:
            # It has fake tensors for bfloat16 only; one group of all rows takes as much arithmetic and memory.
            return torch.mm(args[0], args[1][0])
        # 2. Run functions of real tensors alone.
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if _creates_integers(func, args, kwargs) or (
            # Without any fake tensor, the values are known and decide on shapes.
            tensors and not any(isinstance(tensor, FakeTensor) for tensor in tensors)
        ):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        # 3. Take from real tensors the values that decide on a shape: those of masks and of repetitions.
        if func in (Tensor.__getitem__, Tensor.__setitem__):
            args = (args[0], _expand_masks(tree_map(_mask_to_indices, args[1])), *args[2:])
        if (
            func in (torch.repeat_interleave, Tensor.repeat_interleave)
            and len(args) > 1
            and isinstance(args[1], Tensor)
        ):
            kwargs = {**kwargs, "output_size": int(args[1].sum())}
        # 4. Apply CUDA's autocast, whose list of functions in float32 differs from the CPU's.
        if func in _FLOAT32_OPS and torch.is_autocast_enabled("cpu"):
            args, kwargs = tree_map(_to_float32, (tuple(args), dict(kwargs)))
        return func(*args, **kwargs)

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if torch.is_autocast_enabled("cpu"):
            dtype = torch.get_autocast_dtype("cpu")
            query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        is_fused = self.has_flash or not enable_gqa or query.shape[1] == key.shape[1]
        batch, heads, num_queries, dim = query.shape
        num_pairs = batch * heads * num_queries * key.shape[2] / (2 if is_causal else 1)
        # Two products, of queries and keys and of weights and values, with two operations per pair and channel each.
        self.live.flops += 4.0 * num_pairs * dim
        # An empty mask in the input's dtype replaces the additive one; all heads share it.
        mask = None if attn_mask is None else query.new_empty(attn_mask.shape)
        # Five products in the backward pass, one of which computes the scores again.
        out: Tensor = _Attention.apply(query, key, value, mask, is_fused, 10.0 * num_pairs * dim, self.live)
        return out


class _Attention(torch.autograd.Function):
    """Allocates what the GPU's kernel would, and computes nothing."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        is_fused: bool,
        back: float,
        live: LiveBytes,
    ) -> Tensor:
        add_launches(1)
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        # (batch, heads, queries): the fused kernel keeps one number per query, the other all probabilities.
        softmax = query.new_empty(query.shape[:3], dtype=torch.float32)
        if not is_fused:
            softmax = query.new_empty(*query.shape[:3], key.shape[2], dtype=torch.float32)
            _ = torch.empty_like(softmax)  # scores before their softmax
        ctx.save_for_backward(query, key, value, mask, out, softmax)
        ctx.is_fused, ctx.flops, ctx.live = is_fused, back, live
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, _, _, softmax = ctx.saved_tensors
        ctx.live.flops += ctx.flops
        work = [torch.empty_like(query, dtype=torch.float32), torch.empty_like(softmax)]
        if query.shape[1] != key.shape[1]:  # gradients per query head, summed over each group at the end
            work += [key.new_empty(key.shape[0], query.shape[1], *key.shape[2:]) for _ in range(2)]
        if not ctx.is_fused:
            work.append(torch.empty_like(softmax))
        results = tuple(torch.empty_like(tensor) for tensor in (query, key, value))
        # Freed after the results exist, so that the peak holds both.
        del work
        return (*results, None, None, None, None)


def _creates_integers(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Returns whether a tensor of ids, masks or positions is created from plain numbers."""
    if func not in (torch.arange, torch.tensor, torch.zeros, torch.ones, torch.full):
        return False
    if (dtype := kwargs.get("dtype")) is not None:
        return dtype in (torch.int64, torch.int32, torch.bool)
    return func in (torch.arange, torch.tensor) and not any(
        isinstance(leaf, float | Tensor) for leaf in tree_leaves(args)
    )


def _to_float32(value: Any) -> Any:
    is_narrow = isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16)
    return value.float() if is_narrow else value


def _mask_to_indices(index: Any) -> Any:
    """Replaces a real mask by the indices of its true elements."""
    if isinstance(index, Tensor) and index.dtype == torch.bool and not isinstance(index, FakeTensor):
        with unset_fake_temporarily():
            return _MaskIndices(index.nonzero(as_tuple=True))
    return index


class _MaskIndices:
    def __init__(self, indices: tuple[Tensor, ...]) -> None:
        self.indices = indices


def _expand_masks(index: Any) -> Any:
    """Returns the index with each mask expanded to one index tensor per dimension."""
    if isinstance(index, _MaskIndices):
        return index.indices
    if isinstance(index, tuple):
        return tuple(
            expanded for entry in index for expanded in (entry.indices if isinstance(entry, _MaskIndices) else (entry,))
        )
    return index
