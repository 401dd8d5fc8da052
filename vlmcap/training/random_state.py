"""Saves and restores the state of every random generator."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.distributed as dist


def random_states() -> dict[str, Any]:
    """Returns the states of the generators of Python, NumPy, torch and CUDA, as plain data and tensors."""
    name, keys, position, has_gauss, gauss = np.random.get_state()
    version, internal, gauss_next = random.getstate()
    return {
        "python": [version, list(internal), gauss_next],
        # Plain data and tensors, as `torch.load(weights_only=True)` refuses NumPy arrays. int64 holds the uint32 keys.
        "numpy": [
            str(name),
            torch.from_numpy(np.asarray(keys).astype(np.int64)),
            int(position),
            int(has_gauss),
            float(gauss),
        ],
        "torch": torch.get_rng_state(),
        # asking an unused CUDA would initialise it
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
    }


def set_random_states(states: Mapping[str, Any]) -> None:
    """Restores what `random_states` returned."""
    version, internal, gauss_next = states["python"]
    random.setstate((version, tuple(internal), gauss_next))
    name, keys, position, has_gauss, gauss = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(states["torch"])
    if torch.cuda.is_available():
        # A resumed run may have fewer GPUs.
        torch.cuda.set_rng_state_all(states["cuda"][: torch.cuda.device_count()])


def gather_random_states() -> list[dict[str, Any]]:
    """Returns the `random_states` of all processes by rank; every process must call this function."""
    states: list[dict[str, Any]] = [random_states()]
    if dist.is_available() and dist.is_initialized():
        states = [{} for _ in range(dist.get_world_size())]
        dist.all_gather_object(states, random_states())
    return states
