"""What a whole vision-language model gives when it is taken apart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from vlmcap.models.captioner import VideoCaptioner
from vlmcap.types import GridTHW


@dataclass(frozen=True, slots=True)
class PretrainedParts:
    """A whole model as encoder, projector and language model; together they hold each of its used weights once.

    Attributes:
        encoder: Frozen vision tower, with the interface of `VisionEncoder`.
        projector: Its projector or merger, float32.
        llm: The language part with its head, frozen.
        num_tokens: (F, (h, w)) -> V without building anything, F in temporal patches where the encoder joins frames; picklable.
        captioner_class: Makes the captioner of (encoder, projector, llm, prompt, generation).
        visual_prefix: Text right before the visual tokens.
        visual_suffix: Text right behind them.
        visual_layout: A clip's size -> runs of placeholders and text between them, picklable; None for one run of placeholders.
    """

    encoder: Any
    projector: Any
    llm: nn.Module
    num_tokens: Callable[[int, tuple[int, int]], int]
    captioner_class: Callable[..., VideoCaptioner] = VideoCaptioner
    visual_prefix: str = ""
    visual_suffix: str = ""
    visual_layout: Callable[[GridTHW | None], Sequence[int | Sequence[int]]] | None = None
