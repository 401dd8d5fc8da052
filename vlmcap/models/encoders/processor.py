"""How a checkpoint wants its pixels, from its own processor file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

_RESAMPLING = {2: "bilinear", 3: "bicubic"}  # PIL's numbers, as processor files hold them

# A tower's own checkpoint has the first file; whole checkpoints keep all processors in the second, and some have one for video alone.
_FILES = (
    ("preprocessor_config.json", None),
    ("processor_config.json", "image_processor"),
    ("video_preprocessor_config.json", None),
    ("processor_config.json", "video_processor"),
)


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """Normalisation and resizing; a family's values, or those of a checkpoint.

    Attributes:
        mean: A channel, of pixels in 0…1.
        std: Standard deviation a channel.
        resampling: "bicubic" or "bilinear".
        is_cropped: The shorter side is resized and the centre cut, instead of squeezing both sides.
        image_size: Side of the square that comes out; None where no file says it.
        short_side: Pixels of the shorter side before the cut; None is `image_size`.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    resampling: str = "bicubic"
    is_cropped: bool = False
    image_size: int | None = None
    short_side: int | None = None

    def updated(self, values: Mapping[str, Any]) -> Preprocessing:
        """With what a processor file says in place of the family's values."""
        size, crop = values.get("size"), values.get("crop_size")
        is_squeezed = isinstance(size, Mapping) and "height" in size
        is_cropped = bool(values.get("do_center_crop", self.is_cropped)) and not is_squeezed
        edge = _edge(size)
        return replace(
            self,
            mean=tuple(values.get("image_mean", self.mean)),
            std=tuple(values.get("image_std", self.std)),
            resampling=_RESAMPLING.get(values.get("resample"), self.resampling),  # type: ignore[arg-type]
            is_cropped=is_cropped,
            image_size=_edge(crop) or edge if is_cropped else edge,
            short_side=edge if is_cropped else None,
        )

    def short_side_for(self, image_size: int) -> int | None:
        """Pixels of the shorter side before a cut of `image_size`, in the checkpoint's proportion; None if they are the same."""
        if self.short_side is None or self.image_size is None or self.short_side <= self.image_size:
            return None
        return round(self.short_side * image_size / self.image_size)


def read_processor(folder: Path) -> dict[str, Any]:
    """What the processor file of a checkpoint says of images, or nothing where there is none."""
    for name, section in _FILES:
        file = folder / name
        if not file.is_file():
            continue
        values: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if section is None or section in values:
            return values if section is None else values[section]
    return {}


def _edge(size: Any) -> int | None:
    """One side in pixels, out of the ways in which processor files say it."""
    if isinstance(size, Mapping):
        size = size.get("shortest_edge") or size.get("height")
    return None if size is None else int(size)
