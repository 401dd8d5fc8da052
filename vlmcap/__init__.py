"""Korean video captioning: assemble, fine-tune, score and compare vision-language models."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlmcap.models.captioner import VideoCaptioner

__version__ = "0.1.0"


def load(checkpoint: str | Path, **overrides: Any) -> VideoCaptioner:
    """Loads a captioner from a checkpoint that train.py wrote: `vlmcap.load(path).caption(["clip.mp4"])`.

    Args:
        checkpoint: File of a run, or folder of `vlmcap export`.
        overrides: Keys of the configuration to values: `vlmcap.load(path, **{"hardware.accelerator": "cpu"})`.

    Raises:
        UserError: The checkpoint, or the encoder or language model under it, is missing or is another one.
    """
    from vlmcap.training.checkpoints.load import load_captioner

    return load_captioner(checkpoint, overrides)


__all__ = ["__version__", "load"]
