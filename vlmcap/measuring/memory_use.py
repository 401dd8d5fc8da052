"""Memory in use while something is measured: of the GPU, or of the process on a CPU."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from dataclasses import dataclass
from pathlib import Path

import torch

from vlmcap.planning.hardware import GIB

_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # of glibc's mallopt
_LARGE = 1 << 16  # bytes; larger allocations go back to the system when they are freed


@dataclass(frozen=True, slots=True)
class PeakMemory:
    """Peak memory of a phase, in GiB.

    Attributes:
        allocated: Peak of tensors; on a CPU the peak of the process, over what it had before the model.
        reserved: Peak held by PyTorch's allocator; equal to `allocated` on a CPU.
    """

    allocated: float = 0.0
    reserved: float = 0.0


class MemoryMeter:
    """Measures peak memory of phases.

    Args:
        device: "cpu", or a CUDA device.
    """

    def __init__(self, device: str) -> None:
        self.device, self.is_cuda = device, torch.device(device).type == "cuda"
        if not self.is_cuda:
            _return_freed_memory()
        self._base = 0.0 if self.is_cuda else resident_bytes("VmRSS")

    def start(self) -> None:
        """Begins a phase: releases unused memory and resets the peak."""
        gc.collect()
        if self.is_cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            reset_peak()

    def peak(self) -> PeakMemory:
        """Returns the peak since the phase began."""
        if self.is_cuda:
            allocated = torch.cuda.max_memory_allocated(self.device) / GIB
            return PeakMemory(allocated, torch.cuda.max_memory_reserved(self.device) / GIB)
        grown = (resident_bytes("VmHWM") - self._base) / GIB
        return PeakMemory(grown, grown)

    def context_gib(self) -> float:
        """Returns GPU memory beside PyTorch's allocator: context, kernels, workspaces and other programs."""
        if not self.is_cuda:
            return 0.0
        # The driver's figures, for the whole GPU.
        free, total = torch.cuda.mem_get_info(self.device)
        return (total - free - torch.cuda.memory_reserved(self.device)) / GIB


def reset_peak() -> None:
    """Resets the peak of the resident set, which only Linux supports."""
    # "5" sets the peak VmHWM to the present resident set, see `man 5 proc`.
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def resident_bytes(name: str) -> float:
    """Returns memory of this process in bytes: its resident set ("VmRSS"), the peak of it ("VmHWM"), or "RssAnon"."""
    with open("/proc/self/status", encoding="ascii") as file:
        line = next(line for line in file if line.startswith(name))
    return float(line.split()[1]) * 1024  # such as "VmRSS:     123456 kB"


def _return_freed_memory() -> None:
    """Makes glibc return freed memory now and in the future, so that the resident set shows what is alive."""
    # Other C libraries have no such functions.
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.mallopt(_MMAP_THRESHOLD, _LARGE)
        library.mallopt(_TRIM_THRESHOLD, _LARGE)
        library.malloc_trim(0)
