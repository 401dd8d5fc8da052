"""A small specification, changed by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from vlmcap.models.projectors import ProjectorSpec

DV, DL, FRAMES, QUESTION = 6, 8, 4, 5


@pytest.fixture
def spec_of() -> Callable[..., ProjectorSpec]:
    """4 frames of 4 × 4 patches, width 6 to 8, two heads; seeds the weights that are built next."""

    def make(kind: str = "mlp", **changes: Any) -> ProjectorSpec:
        torch.manual_seed(0)
        small: dict[str, Any] = {"grid": (4, 4), "num_frames": FRAMES, "num_heads": 2, "num_queries": 4, "num_prompt_tokens": QUESTION}
        small |= {"resample_size": 4, "window": 3, "num_global": 2}
        return ProjectorSpec(kind, DV, DL, **(small | changes))

    return make
