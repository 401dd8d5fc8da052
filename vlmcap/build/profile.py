"""What `callbacks=profile` adds to a run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from vlmcap.config import Config

if TYPE_CHECKING:
    from vlmcap.data.loading.datamodule import CaptionDataModule
    from vlmcap.training.profiling import StepProfile


def step_profile(config: Config, data: CaptionDataModule, folder: Path) -> StepProfile | None:
    """The callback that times steps, and the training data told to say how long reading takes; None where nobody asked."""
    if not config.callbacks.profile.enabled:
        return None
    from vlmcap.training.profiling import StepProfile

    profile = StepProfile(config.callbacks.profile, folder / "profile")
    data.make_dataset = profile.watching(data.make_dataset, data.clips["train"])
    return profile
