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
_LARGE = 1 << 16  # bytes: what is larger goes back to the system when it is freed


@dataclass(frozen=True, slots=True)
class Use:
    """Memory in use, in GiB.

    Attributes:
        allocated: By tensors, at most; on a CPU by the process, over what it had before the model.
        reserved: Held by PyTorch's allocator, at most; the same as `allocated` on a CPU.
    """

    allocated: float
    reserved: float


class MemoryUse:
    """Peaks of phases.

    Args:
        device: "cpu", or a CUDA device.
    """

    def __init__(self, device: str) -> None:
        self.device, self.is_cuda = device, torch.device(device).type == "cuda"
        if not self.is_cuda:
            _return_freed_memory()
        self._base = 0.0 if self.is_cuda else resident("VmRSS")

    def start(self) -> None:
        """Begins a phase: what is not needed goes back, and the peak is counted anew."""
        gc.collect()
        if self.is_cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            reset_peak()

    def peak(self) -> Use:
        """The most since the phase began."""
        if self.is_cuda:
            allocated = torch.cuda.max_memory_allocated(self.device) / GIB
            return Use(allocated, torch.cuda.max_memory_reserved(self.device) / GIB)
        grown = (resident("VmHWM") - self._base) / GIB
        return Use(grown, grown)

    def context_gib(self) -> float:
        """What is taken on the GPU beside PyTorch's allocator.

        The context, kernels and workspaces, and other programs'.
        """
        if not self.is_cuda:
            return 0.0
        free, total = torch.cuda.mem_get_info(self.device)
        return (total - free - torch.cuda.memory_reserved(self.device)) / GIB


def reset_peak() -> None:
    """Linux alone keeps a peak that can be set back."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def resident(name: str) -> float:
    """Bytes of the process in memory, now ("VmRSS") or at most ("VmHWM")."""
    with open("/proc/self/status", encoding="ascii") as file:
        line = next(line for line in file if line.startswith(name))
    return float(line.split()[1]) * 1024


def _return_freed_memory() -> None:
    """Makes glibc give back what was freed, now and from now on, as the resident set is to show what is alive."""
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.mallopt(_MMAP_THRESHOLD, _LARGE)
        library.mallopt(_TRIM_THRESHOLD, _LARGE)
        library.malloc_trim(0)
