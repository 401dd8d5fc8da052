"""Preprocessing of a checkpoint, and the transforms that data workers apply to decoded frames in uint8.

The results match those of the checkpoint's own image processor.

Legend: F frames, T tiles per frame, H/W pixels, p side of a patch, h/w patch rows and columns.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmcap.types import GridTHW

# Keys are PIL's constants, as in processor files. PyTorch antialiases no Lanczos (1), for which bicubic is closest.
_RESAMPLING = {1: "bicubic", 2: "bilinear", 3: "bicubic"}
# The checkpoint of a tower has the first file; pretrained VLMs keep all processors in the second, and some have one for
# video only.
_FILES = (
    ("preprocessor_config.json", None),
    ("processor_config.json", "image_processor"),
    ("video_preprocessor_config.json", None),
    ("processor_config.json", "video_processor"),
)


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """Normalisation and resizing of a family of towers or of a checkpoint.

    Attributes:
        mean: Mean per channel of pixels in 0…1; empty if unknown.
        std: Standard deviation per channel.
        resampling: "bicubic" or "bilinear".
        is_cropped: Whether frames are resized by the shorter side and centre-cropped, instead of squeezed to a square.
        image_size: Side of the resulting square; None if no file states it.
        short_side: Pixels of the shorter side before the crop; None is `image_size`.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    resampling: str = "bicubic"
    is_cropped: bool = False
    image_size: int | None = None
    short_side: int | None = None

    def updated(self, values: Mapping[str, Any]) -> Preprocessing:
        """Returns a copy with the values of a processor file."""
        size, crop = values.get("size"), values.get("crop_size")
        # {"height": …, "width": …} means a square without a crop, {"shortest_edge": …} a crop.
        is_squeezed = isinstance(size, Mapping) and "height" in size
        is_cropped = bool(values.get("do_center_crop", self.is_cropped)) and not is_squeezed
        edge = _edge(size)
        mean, std = self._normalisation(values)
        return replace(
            self,
            mean=mean,
            std=std,
            resampling=_RESAMPLING.get(values.get("resample"), self.resampling),  # type: ignore[arg-type]
            is_cropped=is_cropped,
            image_size=(_edge(crop) or edge if is_cropped else edge) or self.image_size,
            short_side=(edge or self.short_side) if is_cropped else None,
        )

    def _normalisation(self, values: Mapping[str, Any]) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Returns mean and standard deviation of pixels in 0…1, for any scale that a processor applies first."""
        mean, std = values.get("image_mean") or self.mean, values.get("image_std") or self.std
        if values.get("do_normalize") is False:
            mean, std = (0.0,) * 3, (1.0,) * 3
        # Pixels after the processor's rescaling = factor × uint8 value.
        factor = 1.0 if values.get("do_rescale") is False else values.get("rescale_factor") or 1 / 255
        scale = factor * 255  # of pixels in 0…1
        if abs(scale - 1) < 1e-6:
            return tuple(mean), tuple(std)
        # (x · scale - mean) / std = (x - mean / scale) / (std / scale)
        return tuple(value / scale for value in mean), tuple(value / scale for value in std)

    def short_side_for(self, image_size: int) -> int | None:
        """Returns the shorter side before a crop of `image_size`, in the checkpoint's ratio; None if they are equal."""
        if self.short_side is None or self.image_size is None or self.short_side <= self.image_size:
            return None
        return round(self.short_side * image_size / self.image_size)


def read_processor(folder: Path) -> dict[str, Any]:
    """Reads the image processor file of a checkpoint; empty if there is none."""
    for name, section in _FILES:
        file = folder / name
        if not file.is_file():
            continue
        values: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if section is None or section in values:
            return values if section is None else values[section]
    return {}


def timm_processor(values: Mapping[str, Any]) -> dict[str, Any]:
    """Translates timm's `pretrained_cfg` to the keys of a processor file of transformers; empty for other content."""
    if "mean" not in values:
        return {}
    side = int((values.get("input_size") or (3, 224, 224))[-1])
    return {
        "image_mean": values["mean"],
        "image_std": values["std"],
        "resample": {"bilinear": 2}.get(values.get("interpolation", "bicubic"), 3),
        "do_center_crop": values.get("crop_mode", "center") == "center",
        # The crop is this share of the resized side.
        "size": {"shortest_edge": int(side / (values.get("crop_pct") or 1))},
        "crop_size": side,
    }


def preprocessing_of(model_type: str) -> Preprocessing:
    """Returns the preprocessing of a model type's image processor in transformers, without sizes.

    Mean and std are empty if there is no image processor.
    """
    import transformers
    from transformers.models.auto.configuration_auto import model_type_to_module_name
    from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES as KNOWN

    module = model_type_to_module_name(model_type)
    # transformers lists the processor classes of a model type under any of these spellings.
    names = KNOWN.get(model_type) or KNOWN.get(module) or KNOWN.get(module.replace("_", "-")) or {}
    unknown = Preprocessing((), ())
    for name in (names.get("pil"), names.get("torchvision")):
        try:
            processor = getattr(transformers, name or "", None)
            values = {key: getattr(processor, key, None) for key in _DEFAULTS}
        except ImportError:  # torchvision is not installed
            continue
        if processor is not None:
            return unknown.updated({key: value for key, value in values.items() if value is not None})
    return unknown


_DEFAULTS = ("image_mean", "image_std", "resample", "do_center_crop", "do_normalize", "do_rescale", "rescale_factor")


def _edge(size: Any) -> int | None:
    """Returns one side in pixels from any of the formats in processor files."""
    if isinstance(size, Mapping):
        size = size.get("shortest_edge") or size.get("height")
    return None if size is None else int(size)


@dataclass(frozen=True, slots=True)
class FrameTransform:
    """Resizes frames to squares of one size; picklable for the data workers.

    Attributes:
        image_size: Side of the square in pixels.
        resampling: "bicubic" or "bilinear", antialiased.
        is_cropped: Whether to resize the shorter side and crop the centre (CLIP) instead of squeezing (SigLIP).
        short_side: Pixels of the shorter side before the crop; None is `image_size`.
    """

    image_size: int
    resampling: str = "bicubic"
    is_cropped: bool = False
    short_side: int | None = None

    def __call__(self, frames: Tensor) -> Tensor:
        """Resizes frames, uint8 (F, 3, H, W) -> uint8 (F, 3, image_size, image_size)."""
        size, (height, width) = self.image_size, frames.shape[-2:]
        if not self.is_cropped:
            return resize(frames, size, size, self.resampling)
        target, short = self.short_side or size, min(height, width)
        # Rounded down, as transformers does.
        resized = resize(frames, int(target * height / short), int(target * width / short), self.resampling)
        # The middle of both sides.
        top, left = (resized.shape[-2] - size) // 2, (resized.shape[-1] - size) // 2
        return resized[..., top : top + size, left : left + size].contiguous()

    def grid_thw(self, num_frames: int, height: int, width: int) -> GridTHW | None:
        """Returns None, as every clip has the encoder's fixed grid."""
        return None


@dataclass(frozen=True, slots=True)
class ClipTransform(FrameTransform):
    """Resizes the frames of a clip for an encoder that joins consecutive frames.

    The last frame of a clip is repeated to fill its token.

    Attributes:
        frames_per_token: Consecutive frames that the encoder joins.
        grid: Patch grid (h, w) of a frame.
    """

    frames_per_token: int = 2
    grid: tuple[int, int] = (0, 0)

    def __call__(self, frames: Tensor) -> Tensor:
        """Resizes frames, uint8 (F, 3, H, W) -> uint8 (F, 3, image_size, image_size), F rounded up."""
        resized = FrameTransform.__call__(self, frames)  # super() does not find the class of a dataclass with slots
        missing = -len(frames) % self.frames_per_token
        return torch.cat([resized, resized[-1:].expand(missing, -1, -1, -1)]) if missing else resized

    def grid_thw(self, num_frames: int, height: int, width: int) -> GridTHW:
        """Returns the tokens in time, and the encoder's patch grid."""
        return math.ceil(num_frames / self.frames_per_token), *self.grid


@dataclass(frozen=True, slots=True)
class TileTransform:
    """Splits frames into square tiles, like InternVL's dynamic resolution.

    Of the layouts with at most `max_tiles` tiles, the one with the aspect ratio closest to the frame's is used. An
    overview, the whole frame squeezed into one more tile, comes last, unless there is only one tile.
    Source: Chen et al., https://arxiv.org/abs/2404.16821, section 3.3.

    Attributes:
        image_size: Side of a tile in pixels.
        grid: Patch grid (h, w) of a tile.
        max_tiles: Maximum tiles per frame, not counting the overview.
        resampling: "bicubic" or "bilinear", antialiased.
    """

    image_size: int
    grid: tuple[int, int]
    max_tiles: int
    resampling: str = "bicubic"

    def __call__(self, frames: Tensor) -> Tensor:
        """Splits frames, uint8 (F, 3, H, W) -> uint8 (F · T, 3, image_size, image_size).

        Tiles are row-major within a frame, frame after frame.
        """
        size = self.image_size
        rows, columns = self.layout(*frames.shape[-2:])
        resized = resize(frames, rows * size, columns * size, self.resampling)
        cells = resized.unflatten(-2, (rows, size)).unflatten(-1, (columns, size))  # (F, 3, rows, S, columns, S)
        tiles = cells.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)  # -> (F, rows · columns, 3, S, S)
        if rows * columns > 1:
            overview = resize(frames, size, size, self.resampling)
            tiles = torch.cat([tiles, overview[:, None]], dim=1)  # -> (F, T, 3, S, S)
        return tiles.flatten(0, 1).contiguous()

    def grid_thw(self, num_frames: int, height: int, width: int) -> GridTHW | None:
        """Returns frames times tiles, and the grid of a tile, for a clip of height × width pixels."""
        rows, columns = self.layout(height, width)
        return num_frames * num_tiles(rows * columns), *self.grid

    def layout(self, height: int, width: int) -> tuple[int, int]:
        """Returns rows and columns of tiles for a frame of height × width pixels."""
        # This module of transformers needs no torchvision and defines how ties between layouts are broken.
        from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

        # Returns columns first.
        columns, rows = get_optimal_tiled_canvas((height, width), (self.image_size, self.image_size), 1, self.max_tiles)
        return int(rows), int(columns)


def num_tiles(num_cuts: int) -> int:
    """Returns the tiles per frame, including the overview, of a frame split into `num_cuts`."""
    return num_cuts + (num_cuts > 1)


@dataclass(frozen=True, slots=True)
class PatchTransform:
    """Splits frames into patches within a budget, keeping their aspect ratio (NaFlex).

    Source: https://arxiv.org/abs/2502.14786, section 2.4.2.

    Attributes:
        patch_size: Side of a patch in pixels.
        max_patches: Maximum patches per frame, to which the result is padded.
        resampling: "bicubic" or "bilinear", antialiased.
    """

    patch_size: int
    max_patches: int
    resampling: str = "bilinear"

    def __call__(self, frames: Tensor) -> Tensor:
        """Splits frames, uint8 (F, 3, H, W) -> uint8 (F, max_patches, 3 · p · p), row-major, then zeros as padding."""
        size, (rows, columns) = self.patch_size, self.layout(*frames.shape[-2:])
        resized = resize(frames, rows * size, columns * size, self.resampling)
        cells = resized.unflatten(-2, (rows, size)).unflatten(-1, (columns, size))  # (F, 3, h, p, w, p)
        patches = cells.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)  # -> (F, h · w, p · p · 3)
        return F.pad(patches, (0, 0, 0, self.max_patches - rows * columns))

    def grid_thw(self, num_frames: int, height: int, width: int) -> GridTHW | None:
        """Returns frames, patch rows and patch columns for a clip of height × width pixels."""
        return num_frames, *self.layout(height, width)

    def layout(self, height: int, width: int) -> tuple[int, int]:
        """Returns rows and columns of patches for a frame of height × width pixels."""
        from transformers.models.siglip2.image_processing_pil_siglip2 import get_image_size_for_max_num_patches

        rows, columns = get_image_size_for_max_num_patches(height, width, self.patch_size, self.max_patches)
        return int(rows) // self.patch_size, int(columns) // self.patch_size


Transform = FrameTransform | TileTransform | PatchTransform


@dataclass(frozen=True, slots=True)
class StatedGrid:
    """States the size of every clip, also on the encoder's fixed grid, as clips may differ in the number of frames.

    It is picklable for the data workers.

    Attributes:
        varying: Maps F, H and W of decoded frames to the size of a clip, or None for the encoder's fixed grid.
        grid: Fixed grid (h, w) of the encoder.
    """

    varying: Callable[[int, int, int], GridTHW | None]
    grid: tuple[int, int]

    def __call__(self, num_frames: int, height: int, width: int) -> GridTHW:
        """Returns the size in patches of a clip of F frames with H × W pixels."""
        return self.varying(num_frames, height, width) or (num_frames, *self.grid)


def resize(frames: Tensor, rows: int, columns: int, resampling: str) -> Tensor:
    """Resizes frames with antialiasing, uint8 (F, 3, H, W) -> uint8 (F, 3, rows, columns)."""
    # Equal sizes are left alone, so that features do not depend on a resampling by 1.
    if frames.shape[-2:] == (rows, columns):
        return frames
    return F.interpolate(frames, (rows, columns), mode=resampling, antialias=True)
