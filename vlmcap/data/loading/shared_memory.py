"""Tensors from data workers where /dev/shm is small, as in containers (64 MB by default in Docker).

A worker hands over a batch in shared memory. If that is full, torch prints a traceback in a thread of the worker and
loses the batch, and training waits for it forever. Here such a tensor is sent through the worker's pipe instead, which
costs two copies.
"""

from __future__ import annotations

import contextlib
import shutil
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import reduce_storage

_SHM_FOLDER = "/dev/shm"
_ENOUGH_BYTES = 2**30


def shared_memory_problem(needed_bytes: int = _ENOUGH_BYTES) -> str | None:
    """Describes in one sentence why shared memory may be too small for batches of data workers; None if it is not."""
    try:
        free = shutil.disk_usage(_SHM_FOLDER).free
    except OSError:  # systems without it have no such limit
        return None
    if free >= needed_bytes:
        return None
    return (
        f"{_SHM_FOLDER} has {free / 1e6:.0f} MB free, so batches may have to come from the data workers through pipes, "
        "which is slower; start the container with --shm-size=8g or --ipc=host, or set data.num_workers=0"
    )


def use_pipes_when_full() -> None:
    """Lets this process, a data worker, send tensors through its pipe when shared memory is full."""
    ForkingPickler.register(torch.UntypedStorage, _reduce_storage)


def shared_zeros(*shape: int, dtype: torch.dtype) -> Tensor:
    """Returns zeros that this process shares with its forks; not shared if shared memory is full."""
    zeros = torch.zeros(*shape, dtype=dtype)
    with contextlib.suppress(RuntimeError, OSError):
        zeros.share_memory_()
    return zeros


def _reduce_storage(storage: torch.UntypedStorage) -> Any:
    try:
        return reduce_storage(storage)
    except (RuntimeError, OSError):
        if storage.device.type != "cpu":
            raise
    # The bytes themselves go through the pipe.
    return _rebuild_storage, (torch.empty(0, dtype=torch.uint8).set_(storage).numpy().tobytes(),)


def _rebuild_storage(content: bytes) -> torch.UntypedStorage:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8).untyped_storage()
