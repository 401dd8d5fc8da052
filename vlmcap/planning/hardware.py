"""GPUs as plain figures, from their data sheets and from what PyTorch reports on them."""

from __future__ import annotations

import contextlib
import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path

from vlmcap.config import Config

GIB = 2**30
UTILISATION = 0.4  # of a GPU's peak, that models of these sizes reach in training, where nothing was measured
CORE_FLOPS = 60e9  # float32 on one core: measured with CLIP-L's layers on a server CPU
# An estimate, not a measurement: 4 419 kernels per token of Qwen3-8B with LoRA in 4 bits are expected to take 50 to 80
# ms on an L4 or an H100, as eager PyTorch, peft and bitsandbytes need 11 to 18 microseconds of the host for each. The
# cores of a T4's host are older.
LAUNCH_S, OLD_HOST_LAUNCH_S = 15e-6, 20e-6
# An estimate: what a small kernel takes on the GPU in a graph, where the next one follows within half a microsecond
# (https://developer.nvidia.com/blog/cuda-graphs/). No host is faster than this.
KERNEL_S = 2.5e-6
CPU_LAUNCH_S = 28e-6  # measured: 123 ms for those 4 419 operations at a tiny width, the operations themselves included


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """What a plan needs to know of a GPU.

    Attributes:
        usable_gib: Memory that PyTorch reports, which is less than the name says.
        peak_flops: Dense half-precision operations a second.
        bytes_per_s: Of its memory.
        has_flash: Compute capability 8.0 or newer.
        context_gib: The CUDA context, and the kernels and workspaces of cuBLAS and cuDNN.
        utilisation: Share of `peak_flops` that training reaches.
        beyond_ratio: What is multiplied with the planned bytes beyond weights and optimiser state.
        bandwidth_share: Share of `bytes_per_s` that writing captions reaches.
        launch_s: Host seconds per kernel launch while captions are written, dispatch by PyTorch and Python included.
        kernel_s: The same where the step is a CUDA graph.
        calibrated: GPU and day of the measurement that the last four and the context come from; empty where they are
            assumed.
    """

    usable_gib: float
    peak_flops: float
    bytes_per_s: float
    has_flash: bool = True
    context_gib: float = 0.6
    utilisation: float = UTILISATION
    beyond_ratio: float = 1.0
    bandwidth_share: float = 1.0
    launch_s: float = LAUNCH_S
    kernel_s: float = KERNEL_S
    calibrated: str = ""


CARDS = {
    "t4": DeviceInfo(14.6, 65e12, 320e9, has_flash=False, launch_s=OLD_HOST_LAUNCH_S),
    "l4": DeviceInfo(22.0, 121e12, 300e9),
    "a100": DeviceInfo(39.4, 312e12, 1555e9),
    "a100_80": DeviceInfo(79.1, 312e12, 2039e9),
    "h100": DeviceInfo(79.1, 989e12, 3350e9, context_gib=0.8),
}


def device_info(hardware: str, memory_gib: float, num_cores: int | None = None) -> DeviceInfo:
    """The GPU of a hardware profile; one without an entry counts as an L4 of its size.

    Args:
        hardware: Name under `conf/hardware`.
        memory_gib: Of the profile.
        num_cores: Of a CPU; None for a GPU.
    """
    if num_cores is not None:
        return DeviceInfo(memory_gib, num_cores * CORE_FLOPS, num_cores * 8e9, context_gib=0.0, launch_s=CPU_LAUNCH_S)
    known = CARDS.get(hardware)
    return known or DeviceInfo(0.92 * memory_gib, CARDS["l4"].peak_flops, CARDS["l4"].bytes_per_s)


_MODELS = {"t4": r"\bT4\b", "l4": r"\bL4\b", "a100": r"\bA100\b", "a100_80": r"\bA100\b", "h100": r"\bH100\b"}
_SHARED = 0.9  # of a profile's memory that a GPU of its model has at least; a slice of one (MIG) has less


def matching_profile(name: str, total_gib: float) -> str | None:
    """The hardware profile that was made for this very GPU.

    Args:
        name: As PyTorch reports it, such as "NVIDIA L4".
        total_gib: Its memory.
    """
    fitting = [
        key
        for key, pattern in _MODELS.items()
        if re.search(pattern, name) and total_gib >= _SHARED * CARDS[key].usable_gib
    ]
    return max(fitting, key=lambda key: CARDS[key].usable_gib, default=None)


def suitable_profile(name: str, total_gib: float, capability: tuple[int, int]) -> str | None:
    """The profile that suits a GPU: its own, or that of the largest GPU which has no more memory and no more abilities.

    None if none.

    Args:
        name: As PyTorch reports it.
        total_gib: Its memory.
        capability: Compute capability.
    """
    if own := matching_profile(name, total_gib):
        return own
    is_old = capability < (8, 0)
    fitting = [key for key, gpu in CARDS.items() if gpu.usable_gib <= total_gib and not (gpu.has_flash and is_old)]
    return max(fitting, key=lambda key: CARDS[key].usable_gib, default=None)


@dataclass(frozen=True, slots=True)
class DetectedDevice:
    """A GPU, or the processor, of this machine.

    Attributes:
        name: As PyTorch names it.
        total_gib: Of its memory.
        free_gib: Of it, free now.
        profile: Name under `conf/hardware` that suits it; None if none does.
        capability: Compute capability; None of a processor.
    """

    name: str
    total_gib: float
    free_gib: float
    profile: str | None
    capability: tuple[int, int] | None = None


def detect_gpu() -> DetectedDevice | None:
    """The CUDA device that a run here would take; None without one."""
    import torch

    if not torch.cuda.is_available():
        return None
    device = torch.cuda.current_device()
    free, total = torch.cuda.mem_get_info(device)
    name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    return DetectedDevice(name, total / GIB, free / GIB, suitable_profile(name, total / GIB, capability), capability)


def detect_cpu() -> DetectedDevice:
    """This machine's processor and memory."""
    total, free = _memory_gib()
    return DetectedDevice(f"{_processor_name()}, {os.cpu_count() or 1} cores", total, free, "cpu")


def _processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine() or "processor"


def _memory_gib() -> tuple[float, float]:
    """All, and what a program may take; 0 where the system does not say.

    A container's limit counts as the machine's memory.
    """
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        sizes = {name: float(rest.split()[0]) * 1024 / GIB for name, _, rest in (line.partition(":") for line in lines)}
        total, free = sizes["MemTotal"], sizes["MemAvailable"]
    except (OSError, KeyError, ValueError, IndexError):
        return 0.0, 0.0
    for limit, used in _container_gib():
        total, free = min(total, limit), min(free, max(0.0, limit - used))
    return total, free


_GROUPS = Path("/sys/fs/cgroup")
_NAMES = (
    ("memory.max", "memory.current"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes"),
)  # of control groups, version 2 and 1


def _container_gib() -> list[tuple[float, float]]:
    """Limit and use of the control groups that this process is in, where they have a limit.

    Files in memory that can go count as free.
    """
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="ascii").splitlines()
    except OSError:
        return []
    own = [path.strip("/") for _, kinds, path in (line.split(":", 2) for line in lines) if kinds in ("", "memory")]
    folders = {
        folder
        for path in own
        for root in (_GROUPS, _GROUPS / "memory")
        for folder in (root / path, *(root / path).parents)
    }
    found = []
    for folder in sorted(folder for folder in folders if folder.is_relative_to(_GROUPS)):
        for limit, use in _NAMES:
            with contextlib.suppress(OSError, ValueError):  # "max" is no number, and no limit
                most, used = int((folder / limit).read_text()), int((folder / use).read_text())
                found.append((most / GIB, (used - _droppable_bytes(folder)) / GIB))
    return found


def _droppable_bytes(folder: Path) -> int:
    try:
        lines = (folder / "memory.stat").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith("inactive_file "))


def planned_device(config: Config) -> DeviceInfo:
    """The GPU of the profile, or this computer, by data sheets alone."""
    cores = (os.cpu_count() or 1) if config.hardware.accelerator == "cpu" else None
    return device_info(config.hardware.name, config.hardware.memory_gib, cores)
