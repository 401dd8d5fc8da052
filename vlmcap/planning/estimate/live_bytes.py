"""Bytes of the tensors that are alive while a step runs, and its arithmetic.

Works on real and on fake tensors, so that the step of a model of true size can be counted without its memory.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

ROUNDING = 512  # bytes: the CUDA allocator hands out multiples of it


class LiveBytes(TorchDispatchMode):
    """Counts storages from their making to their end, by the tag that was set when they were made.

    Attributes:
        tag: What is made now belongs to it.
        peaks: Segment -> bytes by tag at the moment of the segment's largest sum.
        flops: Floating-point operations so far; a multiplication and an addition are two.
    """

    def __init__(self) -> None:
        super().__init__()
        self.tag, self.flops = "other", 0.0
        self.peaks: dict[str, Counter[str]] = {}
        self._segment = "start"
        self._live: dict[int, tuple[str, int, Any]] = {}
        self._by_tag: Counter[str] = Counter()
        self._total, self._peak = 0, 0

    def enter(self, segment: str) -> None:
        """What follows belongs to the segment; entered again, its peak may rise."""
        self._segment = segment
        self._peak = self.peaks[segment].total() if segment in self.peaks else -1
        self._note_peak()

    def snapshot(self) -> Counter[str]:
        """Bytes alive now, by tag."""
        return +Counter(self._by_tag)

    def own(self, tensor: Tensor, tag: str) -> None:
        """Gives a live tensor to another tag; one that was made outside is counted from now on."""
        key = self._key(tensor)
        if key in self._live:
            old, size, reference = self._live[key]
            self._by_tag[old] -= size
            self._by_tag[tag] += size
            self._live[key] = (tag, size, reference)
        else:
            self._add(tensor, tag)

    def exclude(self, tensors: Sequence[Tensor]) -> None:
        """Leaves storages out that are counted elsewhere, such as weights."""
        for tensor in tensors:
            self._live.setdefault(self._key(tensor), ("excluded", 0, tensor.untyped_storage()))

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._add(tensor, self.tag)
        packet = getattr(func, "_overloadpacket", None)
        if packet in flop_registry:
            self.flops += float(flop_registry[packet](*args, **(kwargs or {}), out_val=out))
        return out

    @staticmethod
    def _key(tensor: Tensor) -> int:
        return int(tensor.untyped_storage()._cdata)

    def _add(self, tensor: Tensor, tag: str) -> None:
        storage = tensor.untyped_storage()
        key = int(storage._cdata)
        if key in self._live:
            return
        size = -(-storage.nbytes() // ROUNDING) * ROUNDING
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


def tag_module(module: torch.nn.Module, live: LiveBytes, tag: str) -> None:
    """What is made inside of the module's forward gets the tag, unless a module inside of it has one of its own."""
    outer: list[str] = []

    def enter(*_: Any) -> None:
        outer.append(live.tag)
        live.tag = tag

    def leave(*_: Any) -> None:
        live.tag = outer.pop()

    module.register_forward_pre_hook(enter)
    module.register_forward_hook(leave, always_call=True)
