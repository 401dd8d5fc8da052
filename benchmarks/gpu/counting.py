"""Counts what a GPU and its host do: waits of the host, launches, busy time of the GPU, and memory of the host."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from vlmcap.measuring.memory_use import resident_bytes
from vlmcap.planning.hardware import GIB

_WAIT = "called a synchronizing CUDA operation"  # PyTorch's warning under torch.cuda.set_sync_debug_mode("warn")
_CALLS = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch", "cudaMemcpy", "cudaMemset")  # beginnings of names
_EVERY_S = 0.005


class Waits:
    """Counts the operations that made the host wait for the GPU, between `start` and `stop`; a CPU has none."""

    def __init__(self, device: str) -> None:
        self.is_cuda, self.count = device == "cuda", 0
        self._caught: Any = None
        self._list: list[warnings.WarningMessage] = []

    def start(self) -> None:
        """Begins to count."""
        self._caught = warnings.catch_warnings(record=True)
        self._list = self._caught.__enter__()
        warnings.simplefilter("always")
        if self.is_cuda:
            torch.cuda.set_sync_debug_mode("warn")

    def stop(self) -> None:
        """Adds what was counted to `count`."""
        if self._caught is None:
            return
        if self.is_cuda:
            torch.cuda.set_sync_debug_mode("default")
        self.count += sum(_WAIT in str(one.message) for one in self._list)
        self._caught.__exit__(None, None, None)
        self._caught = None


@dataclass(frozen=True, slots=True)
class Launches:
    """Work of a GPU; on a CPU, the operations of PyTorch.

    Attributes:
        count: Calls by which the host started kernels, graphs and copies.
        busy_s: Seconds of kernels and copies, which this program puts on one stream.
    """

    count: int
    busy_s: float

    def __sub__(self, other: Launches) -> Launches:
        return Launches(self.count - other.count, self.busy_s - other.busy_s)


def launches(work: Callable[[], object], device: str) -> Launches:
    """Profiles a function, which makes it slower."""
    from torch.profiler import DeviceType, ProfilerActivity, profile

    is_cuda = device == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if is_cuda else ProfilerActivity.CPU], acc_events=True) as profiler:
        work()
        wait(device)
    events = list(profiler.events() or [])
    kinds = _CALLS if is_cuda else ("aten::",)
    count = sum(event.device_type == DeviceType.CPU and event.name.startswith(kinds) for event in events)
    busy = sum(event.time_range.elapsed_us() for event in events if event.device_type == DeviceType.CUDA)
    return Launches(count, busy / 1e6)


def wait(device: str) -> None:
    """Waits until the GPU has finished all its work."""
    if device == "cuda":
        torch.cuda.synchronize()


@dataclass(slots=True)
class HostMemory:
    """Anonymous host memory.

    Attributes:
        base_gib: Memory at the beginning.
        peak_gib: Peak since then.
    """

    base_gib: float
    peak_gib: float

    @property
    def grown_gib(self) -> float:
        """Growth since the beginning."""
        return self.peak_gib - self.base_gib


@contextmanager
def watching_host() -> Iterator[HostMemory]:
    """Samples this process's anonymous memory many times per second.

    Pages of memory-mapped weight files do not count.
    """
    now = resident_bytes("RssAnon") / GIB
    memory, is_over = HostMemory(now, now), threading.Event()

    def sample() -> None:
        while not is_over.wait(_EVERY_S):
            memory.peak_gib = max(memory.peak_gib, resident_bytes("RssAnon") / GIB)

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield memory
    finally:
        is_over.set()
        thread.join()
        memory.peak_gib = max(memory.peak_gib, resident_bytes("RssAnon") / GIB)
