"""Deterministic mode of PyTorch: on while training if it is configured, and off while captions are generated."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vlmcap.errors import UserError, first_line
from vlmcap.libraries import CUBLAS_WORKSPACE

_NO_KERNEL = "does not have a deterministic implementation"  # part of PyTorch's error message
_VARIABLES = {
    "CUBLAS_WORKSPACE_CONFIG": CUBLAS_WORKSPACE,
    "FLASH_ATTENTION_DETERMINISTIC": "1",  # transformers reads it for the package flash-attn
}


@contextmanager
def deterministic_kernels(is_active: bool) -> Iterator[None]:
    """Enables deterministic mode inside the context: equal inputs give equal bits on the same machine.

    The mode is strict, because the backward passes of flash and memory-efficient attention ignore `warn_only`. New
    memory is not filled: filling would cost a pass over every unpacked 4-bit weight, and nothing in this package reads
    memory before writing it. The earlier state is restored at the end.

    Args:
        is_active: Whether to enable the mode; otherwise the context does nothing.

    Raises:
        UserError: An operation has no deterministic kernel on this device.
    """
    if not is_active:
        yield
        return
    import torch

    filling: Any = torch.utils.deterministic

    was_filling = filling.fill_uninitialized_memory
    # Libraries read these variables at their first use; values that the user has set are kept.
    added = [name for name in _VARIABLES if name not in os.environ]
    os.environ.update({name: _VARIABLES[name] for name in added})
    with _mode(True):
        # PyTorch would fill every new tensor with NaN, which takes time and only matters to code that reads such
        # memory.
        filling.fill_uninitialized_memory = False
        try:
            yield
        except RuntimeError as error:
            if _NO_KERNEL not in str(error):
                raise
            operation = first_line(error).partition(f" {_NO_KERNEL}")[0]
            raise UserError(
                f"trainer.deterministic is on, but the operation {operation} has no deterministic kernel on this "
                "device; set trainer.deterministic=false"
            ) from error
        finally:
            filling.fill_uninitialized_memory = was_filling
            for name in added:
                os.environ.pop(name, None)


@contextmanager
def fastest_kernels() -> Iterator[None]:
    """Disables deterministic mode inside the context, and restores the earlier state at the end.

    Generation has no backward pass, and the mode would sort at each write to the key-value cache.
    """
    with _mode(False):
        yield


@contextmanager
def _mode(is_active: bool) -> Iterator[None]:
    import torch

    was_active = torch.are_deterministic_algorithms_enabled()
    was_lenient = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(is_active)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was_active, warn_only=was_lenient)
