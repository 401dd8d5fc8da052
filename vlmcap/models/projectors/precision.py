"""Arithmetic of projectors under autocast."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor


def wide_autocast(features: Tensor) -> AbstractContextManager[object]:
    """Autocast as it is around the projector, but none where it would be float16, whose largest number is 65 504.

    Args:
        features: Tell the device.
    """
    device = autocast_device(features)
    is_enabled = torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=is_enabled and torch.get_autocast_dtype(device) is not torch.float16)


def autocast_device(features: Tensor) -> str:
    """Type of the features' device; autocast does not know the meta device."""
    return "cpu" if features.is_meta else features.device.type
