"""Speed and memory of devices, from GPU data sheets and from what PyTorch and the system report."""

from __future__ import annotations

import contextlib
import platform
import re
from dataclasses import dataclass
from pathlib import Path

from vlmcap.config import Config
from vlmcap.libraries import usable_processors

GIB = 2**30
UTILISATION = 0.4  # share of a GPU's peak that models of these sizes reach in training, where nothing was measured
CORE_FLOPS = 60e9  # float32 operations per second of one core, measured with CLIP-L's layers on a server CPU
# An estimate, not a measurement: 4 419 kernels per token of Qwen3-8B with LoRA in 4 bits are expected to take 50 to 80
# ms on an L4 or an H100, as eager PyTorch, peft and bitsandbytes need 11 to 18 microseconds on the host for each. The
# cores of a T4's host are older.
LAUNCH_S, OLD_HOST_LAUNCH_S = 15e-6, 20e-6
# An estimate of the time of a small kernel in a CUDA graph, where the next one follows within half a microsecond
# (https://developer.nvidia.com/blog/cuda-graphs/). No host launches kernels faster than this.
KERNEL_S = 2.5e-6
CPU_LAUNCH_S = 28e-6  # measured: 123 ms for those 4 419 operations at a tiny width, including the operations


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """Memory and speed of a GPU, or of a CPU, that a plan is made for.

    Attributes:
        usable_gib: Memory that PyTorch reports, which is less than the product name says.
        peak_flops: Dense half-precision operations per second.
        bytes_per_s: Memory bandwidth.
        has_flash: Whether the GPU has compute capability 8.0 or newer.
        context_gib: Memory of the CUDA context and of the kernels and workspaces of cuBLAS and cuDNN.
        utilisation: Share of `peak_flops` that training reaches.
        activation_ratio: Factor on the planned bytes other than weights and optimiser state.
        bandwidth_share: Share of `bytes_per_s` that caption decoding reaches.
        launch_s: Host seconds per kernel launch during caption decoding, including dispatch by PyTorch and Python.
        kernel_s: Seconds per kernel where the decoding step is a CUDA graph.
        calibrated: Device and day of the measurement behind the last five figures and `context_gib`; empty where they
            are assumed.
    """

    usable_gib: float
    peak_flops: float
    bytes_per_s: float
    has_flash: bool = True
    context_gib: float = 0.6
    utilisation: float = UTILISATION
    activation_ratio: float = 1.0
    bandwidth_share: float = 1.0
    launch_s: float = LAUNCH_S
    kernel_s: float = KERNEL_S
    calibrated: str = ""


GPUS = {
    "t4": DeviceInfo(14.6, 65e12, 320e9, has_flash=False, launch_s=OLD_HOST_LAUNCH_S),
    "l4": DeviceInfo(22.0, 121e12, 300e9),
    "a100": DeviceInfo(39.4, 312e12, 1555e9),
    "a100_80": DeviceInfo(79.1, 312e12, 2039e9),  # data sheet of the 80 GB SXM version
    "h100": DeviceInfo(79.1, 989e12, 3350e9, context_gib=0.8),
}


def device_info(hardware: str, memory_gib: float, num_cores: int | None = None) -> DeviceInfo:
    """Returns the device of a hardware profile; a GPU without an entry counts as an L4 with the profile's memory.

    Args:
        hardware: Name under `conf/hardware`.
        memory_gib: Memory of the profile.
        num_cores: Number of CPU cores; None for a GPU.
    """
    if num_cores is not None:
        # 8 GB/s of memory bandwidth per core, an assumption.
        return DeviceInfo(memory_gib, num_cores * CORE_FLOPS, num_cores * 8e9, context_gib=0.0, launch_s=CPU_LAUNCH_S)
    known = GPUS.get(hardware)
    # Drivers and ECC take some of what the product name promises.
    return known or DeviceInfo(0.92 * memory_gib, GPUS["l4"].peak_flops, GPUS["l4"].bytes_per_s)


_NAME_PATTERNS = {"t4": r"\bT4\b", "l4": r"\bL4\b", "a100": r"\bA100\b", "a100_80": r"\bA100\b", "h100": r"\bH100\b"}
_MIN_MEMORY_SHARE = 0.9  # least share of a profile's memory; a MIG slice of such a GPU has less


def matching_profile(name: str, total_gib: float) -> str | None:
    """Returns the hardware profile of exactly this GPU model, or None.

    Args:
        name: Device name that PyTorch reports, such as "NVIDIA L4".
        total_gib: Memory of the GPU.
    """
    fitting = [
        key
        for key, pattern in _NAME_PATTERNS.items()
        if re.search(pattern, name) and total_gib >= _MIN_MEMORY_SHARE * GPUS[key].usable_gib
    ]
    # Of the two A100, the larger one that the memory allows.
    return max(fitting, key=lambda key: GPUS[key].usable_gib, default=None)


def suitable_profile(name: str, total_gib: float, capability: tuple[int, int]) -> str | None:
    """Returns the profile of this GPU, or of the largest GPU that has neither more memory nor more features, or None.

    Args:
        name: Device name that PyTorch reports.
        total_gib: Memory of the GPU.
        capability: Compute capability.
    """
    if profile := matching_profile(name, total_gib):
        return profile
    is_old = capability < (8, 0)
    fitting = [key for key, gpu in GPUS.items() if gpu.usable_gib <= total_gib and not (gpu.has_flash and is_old)]
    return max(fitting, key=lambda key: GPUS[key].usable_gib, default=None)


@dataclass(frozen=True, slots=True)
class DetectedDevice:
    """A GPU or the CPU of this machine.

    Attributes:
        name: GPU name that PyTorch reports, or the CPU's model name.
        total_gib: Total memory; 0 where the system does not report it.
        free_gib: Free memory; 0 where the system does not report it.
        profile: Suitable profile under `conf/hardware`; None if there is none.
        capability: Compute capability; None for a CPU.
    """

    name: str
    total_gib: float
    free_gib: float
    profile: str | None
    capability: tuple[int, int] | None = None


def detect_gpu() -> DetectedDevice | None:
    """Returns the CUDA device that a run on this machine would use; None without one."""
    import torch

    if not torch.cuda.is_available():
        return None
    device = torch.cuda.current_device()
    free, total = torch.cuda.mem_get_info(device)
    name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    return DetectedDevice(name, total / GIB, free / GIB, suitable_profile(name, total / GIB, capability), capability)


def detect_cpu() -> DetectedDevice:
    """Returns this machine's CPU with its memory."""
    total, free = _host_memory_gib()
    return DetectedDevice(f"{_processor_name()}, {usable_processors()} cores", total, free, "cpu")


def _processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine() or "processor"


def _host_memory_gib() -> tuple[float, float]:
    """Returns total and available memory, at most a container's limit; zeros where the system does not report them."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        # "MemTotal:       16316412 kB" -> GiB
        sizes = {name: float(rest.split()[0]) * 1024 / GIB for name, _, rest in (line.partition(":") for line in lines)}
        total, free = sizes["MemTotal"], sizes["MemAvailable"]
    except (OSError, KeyError, ValueError, IndexError):
        return 0.0, 0.0
    for limit, used in _cgroup_limits_gib():
        total, free = min(total, limit), min(free, max(0.0, limit - used))
    return total, free


_CGROUPS = Path("/sys/fs/cgroup")
# Files with limit and use, in control groups of version 2 and of version 1.
_CGROUP_FILES = (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes"))


def _cgroup_limits_gib() -> list[tuple[float, float]]:
    """Returns limit and use of every control group of this process that has a limit.

    The page cache that can be reclaimed counts as free.
    """
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="ascii").splitlines()
    except OSError:
        return []
    # Each line is "number:controllers:path"; a limit of any parent folder applies too.
    groups = [path.strip("/") for _, kinds, path in (line.split(":", 2) for line in lines) if kinds in ("", "memory")]
    folders = {
        folder
        for path in groups
        for root in (_CGROUPS, _CGROUPS / "memory")
        for folder in (root / path, *(root / path).parents)
    }
    limits = []
    for folder in sorted(folder for folder in folders if folder.is_relative_to(_CGROUPS)):
        for limit, use in _CGROUP_FILES:
            with contextlib.suppress(OSError, ValueError):  # "max" means no limit
                most, used = int((folder / limit).read_text()), int((folder / use).read_text())
                # The page cache counts as use, but is given back when memory is needed.
                limits.append((most / GIB, (used - _reclaimable_bytes(folder)) / GIB))
    return limits


def _reclaimable_bytes(folder: Path) -> int:
    try:
        lines = (folder / "memory.stat").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith("inactive_file "))


def planned_device(config: Config) -> DeviceInfo:
    """Returns the device of the hardware profile, or this machine's CPU, from data sheets alone."""
    cores = usable_processors() if config.hardware.accelerator == "cpu" else None
    return device_info(config.hardware.name, config.hardware.memory_gib, cores)
