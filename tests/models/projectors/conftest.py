"""Small settings and sizes with overrides."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.models.projectors.settings import settings_of
from vlmcap.config import ProjectorConfig
from vlmcap.models.projectors import ProjectorSizes

DV, DL, FRAMES, QUESTION = 6, 8, 4, 5
SIZES = {field.name for field in dataclasses.fields(ProjectorSizes)}


@pytest.fixture
def spec_of() -> Callable[..., tuple[ProjectorConfig, ProjectorSizes]]:
    """4 frames of 4 × 4 patches, width 6 to 8, two heads; seeds the weights that are built next."""

    def make(kind: str = "mlp", **changes: Any) -> tuple[ProjectorConfig, ProjectorSizes]:
        torch.manual_seed(0)
        sizes: dict[str, Any] = {"grid": (4, 4), "num_frames": FRAMES, "num_prompt_tokens": QUESTION}
        small = {"num_heads": 2, "num_queries": 4, "num_layers": 2, "resample_size": 4, "window": 3, "num_global": 2}
        sizes |= {name: value for name, value in changes.items() if name in SIZES}
        return settings_of(
            kind, **(small | {name: value for name, value in changes.items() if name not in SIZES})
        ), ProjectorSizes(DV, DL, **sizes)

    return make
