"""What `callbacks=grounding` adds to a run: a black clip, and the callback."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vlmcap.config import Config, Engine
from vlmcap.errors import UserError
from vlmcap.files import replacing

if TYPE_CHECKING:
    from vlmcap.data.loading.datamodule import CaptionDataModule
    from vlmcap.training.evaluation import CaptionEvaluation
    from vlmcap.training.grounding import GroundingCheck
    from vlmcap.types import Clip

_SIDE = 448  # pixels; black stays black at any other size


def blank_clip(config: Config) -> Clip:
    """A clip of `data.num_frames` black pictures, whose file is made on first use.

    A clip like any other, so that its features are cached where those of others are, and frames go through the encoder where theirs do.
    """
    from PIL import Image

    from vlmcap.types import Clip

    file = Path(config.paths.cache_dir) / "black.png"
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as partial:
            Image.new("RGB", (_SIDE, _SIDE)).save(partial, format="PNG")
    return Clip("black", str(file), (), frames=(str(file),) * config.data.num_frames)


def with_blank(config: Config, clips: Mapping[str, Sequence[Clip]]) -> Mapping[str, Sequence[Clip]]:
    """Clips whose features a run needs: with the black one where it is asked for."""
    return {**clips, "black": [blank_clip(config)]} if config.callbacks.grounding.enabled else clips


def grounding_check(config: Config, data: CaptionDataModule, evaluation: CaptionEvaluation, folder: Path) -> GroundingCheck | None:
    """The callback that exchanges videos; None where nobody asked.

    Raises:
        UserError: The language model is elsewhere, so that there is no loss.
    """
    if not config.callbacks.grounding.enabled:
        return None
    if config.evaluation.engine is Engine.vllm:
        raise UserError(
            "callbacks.grounding measures the loss of labels, which evaluation.engine=vllm does not give; "
            "set callbacks.grounding.enabled=false, or evaluation.engine=own"
        )
    from vlmcap.training.grounding import GroundingCheck

    return GroundingCheck(
        config.callbacks.grounding,
        evaluation,
        data,
        folder / "predictions" / "grounding",
        blank=blank_clip(config),
        seed=config.seed,
        max_clips=config.evaluation.max_clips,
    )
