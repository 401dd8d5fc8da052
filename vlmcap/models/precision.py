"""Mixed precision for code that runs without Lightning."""

from __future__ import annotations

import torch


def autocast(device: torch.device | str, dtype: torch.dtype | None) -> torch.autocast:
    """Returns the autocast context of Lightning's `MixedPrecision` plugin, which does not cache cast weights.

    Args:
        device: Device of the model.
        dtype: Dtype of the arithmetic; None disables autocast.
    """
    return torch.autocast(torch.device(device).type, dtype=dtype, enabled=dtype is not None, cache_enabled=False)
