"""Which GPUs there are, and how jobs share them."""

from __future__ import annotations

import os

from vlmcap.config import LauncherConfig


def visible_devices() -> list[str]:
    """Names of the GPUs that this process may use, as CUDA_VISIBLE_DEVICES has them; the GPUs stay untouched."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name.strip() for name in named.split(",") if name.strip()]
    import torch

    return [str(index) for index in range(torch.cuda.device_count())]


def shares(launcher: LauncherConfig, devices: list[str]) -> list[str]:
    """CUDA_VISIBLE_DEVICES of each job that runs at a time; with more jobs than GPUs they share them.

    Args:
        launcher: How many at a time, and GPUs for each.
        devices: Of `visible_devices`.
    """
    size = launcher.gpus_per_job if launcher.gpus_per_job is not None else 1
    groups = [",".join(devices[start : start + size]) for start in range(0, len(devices) - size + 1, size)] if size else []
    count = launcher.n_jobs or len(groups) or 1
    return [groups[index % len(groups)] if groups else "" for index in range(count)]
