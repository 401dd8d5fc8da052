"""Settings of `callbacks=grounding`."""

from __future__ import annotations

from dataclasses import dataclass

from vlmcap.config.checks import require_positive
from vlmcap.config.choices import GroundingMode


@dataclass
class GroundingConfig:
    """Whether captions depend on the video: validation again with the videos exchanged between clips, and with black ones."""

    enabled: bool = False
    mode: GroundingMode = GroundingMode.captions  # loss: label loss alone; no captions are written, which is what takes long
    max_clips: int = 64  # the first ones of the split; while training, at most evaluation.max_clips
    every_n_validations: int = 1  # while training; every split that is scored at the end is measured there too

    def __post_init__(self) -> None:
        require_positive("callbacks.grounding", self, "max_clips", "every_n_validations")
