"""The mixed precision of a run, for what computes without Lightning."""

from __future__ import annotations

import torch


def autocast(device: torch.device | str, dtype: torch.dtype | None) -> torch.autocast:
    """The autocast of Lightning's `MixedPrecision` plugin, which keeps no copies of cast weights.

    Without a type none at all.

    Args:
        device: Device of the model.
        dtype: Type of the arithmetic; None for that of the weights.
    """
    return torch.autocast(torch.device(device).type, dtype=dtype, enabled=dtype is not None, cache_enabled=False)
