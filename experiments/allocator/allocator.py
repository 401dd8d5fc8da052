"""Simulates what PyTorch's CUDA allocator reserves in training steps of true size, from the tensors of fake steps.

python experiments/allocator/allocator.py l4 h100          a row for each recommended experiment
"""

from __future__ import annotations

import bisect
import json
import sys
from types import SimpleNamespace
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import _engine_run_backward

from vlmcap.assembly.components import autocast_dtype, loss_chunk_bytes
from vlmcap.compose import compose
from vlmcap.config import Config
from vlmcap.libraries import silence_libraries
from vlmcap.measuring.steps import step_captions
from vlmcap.models.precision import autocast
from vlmcap.planning.caption_lengths import CaptionLengths
from vlmcap.planning.estimate.live_bytes import CudaEmulationMode, LiveBytes
from vlmcap.planning.estimate.meta_models import PROMPT_TOKENS, fake_llm, text_config
from vlmcap.planning.estimate.sizes import clip_sizes, language_batch
from vlmcap.planning.hardware import GIB, planned_device

_MIB = 2**20
# c10/core/AllocatorConfig.h and c10/cuda/CUDACachingAllocator.cpp: blocks up to 1 MiB share segments of 2 MiB, those
# below 10 MiB segments of 20 MiB, and larger ones have their own, in multiples of 2 MiB. Segments that grow do so by 2
# MiB, or by 20 MiB for large blocks.
_SMALL, _SMALL_SEGMENT, _LARGE_SEGMENT, _LEAST_OWN, _OWN_STEP, _LEAST_BLOCK = (
    _MIB,
    2 * _MIB,
    20 * _MIB,
    10 * _MIB,
    2 * _MIB,
    512,
)


class Pool:
    """Free and taken blocks of one pool; the best fitting free one is taken, and split.

    Args:
        is_small: Whether it is the pool of blocks up to 1 MiB.
        is_expandable: Whether it has a single segment, which grows.
    """

    def __init__(self, is_small: bool, is_expandable: bool) -> None:
        self.is_small, self.is_expandable = is_small, is_expandable
        self.reserved = 0
        self._free: list[tuple[int, int]] = []  # size and start, ascending
        self._ends: dict[int, int] = {}  # end of a free block -> its start
        self._starts: dict[int, int] = {}  # start of a free block -> its size
        self._taken: dict[int, int] = {}  # start -> size
        self._bounds: set[int] = set()  # starts of segments, over which nothing is merged

    def allocate(self, size: int) -> int:
        """The start of a block."""
        index = bisect.bisect_left(self._free, (size, -1))
        if index == len(self._free):
            self._grow(size)
            index = bisect.bisect_left(self._free, (size, -1))
        found, start = self._free[index]
        self._take_out(start)
        least = _LEAST_BLOCK if self.is_small or self.is_expandable else _SMALL + 1
        if found - size >= least:
            self._put(start + size, found - size)
            found = size
        self._taken[start] = found
        return start

    def free(self, start: int) -> None:
        """Gives a block back; free neighbours become one."""
        size = self._taken.pop(start)
        if start not in self._bounds and start in self._ends:
            before = self._ends[start]
            size += self._take_out(before)
            start = before
        if start + size in self._starts and start + size not in self._bounds:
            size += self._take_out(start + size)
        self._put(start, size)

    def _grow(self, size: int) -> None:
        end = self.reserved
        if self.is_expandable:
            step = _SMALL_SEGMENT if self.is_small else _LARGE_SEGMENT
            last = self._ends.get(end)
            start = end if last is None else last
            more = -(-(size - (end - start)) // step) * step
            if last is not None:
                self._take_out(last)
            self._put(start, end - start + more)
        else:
            more = (
                _SMALL_SEGMENT
                if self.is_small
                else _LARGE_SEGMENT
                if size < _LEAST_OWN
                else -(-size // _OWN_STEP) * _OWN_STEP
            )
            self._bounds.add(end)
            self._put(end, more)
        self.reserved += more

    def _put(self, start: int, size: int) -> None:
        bisect.insort(self._free, (size, start))
        self._starts[start], self._ends[start + size] = size, start

    def _take_out(self, start: int) -> int:
        size = self._starts.pop(start)
        del self._ends[start + size]
        self._free.pop(bisect.bisect_left(self._free, (size, start)))
        return size


class Allocator:
    """The pools of a device."""

    def __init__(self, is_expandable: bool) -> None:
        self.pools = {is_small: Pool(is_small, is_expandable) for is_small in (True, False)}

    def allocate(self, size: int) -> tuple[bool, int]:
        """A block of so many bytes, which are a multiple of 512."""
        is_small = size <= _SMALL
        return is_small, self.pools[is_small].allocate(size)

    def free(self, block: tuple[bool, int]) -> None:
        """Gives the block back."""
        self.pools[block[0]].free(block[1])

    @property
    def reserved(self) -> int:
        """Bytes of all segments."""
        return sum(pool.reserved for pool in self.pools.values())


class Replay(LiveBytes):
    """Hands every tensor that is made and freed to allocators."""

    def __init__(self, allocators: list[Allocator]) -> None:
        super().__init__()
        self.allocators, self.peak = allocators, 0
        self._blocks: dict[int, list[tuple[bool, int]]] = {}

    def _add(self, tensor: torch.Tensor, tag: str) -> None:
        known = len(self._live)
        super()._add(tensor, tag)
        key = self._key(tensor)
        size = self._live[key][1]
        if len(self._live) > known and size:
            self._blocks[key] = [allocator.allocate(size) for allocator in self.allocators]
            self.peak = max(self.peak, self._total)

    def _remove(self, key: int, reference: Any) -> None:
        for allocator, block in zip(self.allocators, self._blocks.pop(key, ()), strict=False):
            allocator.free(block)
        super()._remove(key, reference)


def simulate(config: Config) -> dict[str, float]:
    """GiB beyond weights in steps on captions of the data's lengths.

    Allocated, reserved by segments that grow, and by fixed ones.
    """
    sizes, gpu = clip_sizes(config), planned_device(config)
    depth = int(text_config(config).num_hidden_layers)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    llm, captioner_class = fake_llm(config, mode, depth, gpu.has_flash)
    llm.train()
    prompt: Any = SimpleNamespace(question_ids=[1])
    captioner = captioner_class(None, torch.nn.Identity(), llm, prompt, None, loss_chunk_bytes=loss_chunk_bytes(config))
    captioner.project = lambda batch, features: features.flatten(0, 1)  # type: ignore[method-assign]
    width = int(text_config(config).hidden_size)
    allocators = [Allocator(True), Allocator(False)]
    live = Replay(allocators)
    live.exclude([*llm.parameters(), *llm.buffers()])
    trained = [parameter for parameter in llm.parameters() if parameter.requires_grad]
    state: list[torch.Tensor] = []
    lengths = CaptionLengths.assumed(config.llm.caption_tokens)
    steps = step_captions(lengths, config.data.batch_size, 2, is_sorted=False)
    for index, captions in enumerate(steps):
        batch = language_batch(captions, sizes.runs, PROMPT_TOKENS, None, sizes.gap)
        with mode, live, CudaEmulationMode(live, gpu.has_flash):
            visual = torch.empty(len(captions), sizes.num_visual, width, requires_grad=True)
            captioner.encode = lambda batch, visual=visual: visual  # type: ignore[method-assign, misc]
            with autocast("cpu", autocast_dtype(config)):
                loss = captioner(batch)[0]
            _engine_run_backward(
                (loss,), (torch.empty_like(loss),), False, False, (), allow_unreachable=True, accumulate_grad=True
            )
            del loss, visual
            captioner.encode = None  # type: ignore[method-assign, assignment]
            if index % 2:  # a step of the optimizer
                if not state:
                    state += [torch.empty_like(parameter) for parameter in trained for _ in range(2)]
                work = [torch.empty_like(parameter) for parameter in trained]
                del work
                for parameter in trained:
                    parameter.grad = None
    grown, fixed = (allocator.reserved for allocator in allocators)
    return {"allocated": live.peak / GIB, "expandable": grown / GIB, "fixed": fixed / GIB}


def main() -> None:
    """Prints a line of JSON for each name."""
    silence_libraries()
    for name in sys.argv[1:]:
        config = compose([f"experiment=recommended_{name}", "data.root=unset"])
        found = simulate(config)
        shares = {f"{key}_share": round(found[key] / found["allocated"] - 1, 4) for key in ("expandable", "fixed")}
        print(
            json.dumps({"experiment": name, **{key: round(value, 3) for key, value in found.items()}, **shares}),
            flush=True,
        )


if __name__ == "__main__":
    main()
