"""What every vision encoder does: frames in, patch features out, sizes stated.

Legend: B batch, F frames, P patches a frame (row-major over the grid h × w), Dv vision width, H/W pixels.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmcap.errors import UserError

_RESAMPLING = {2: "bilinear", 3: "bicubic"}  # PIL's numbers, as processor files hold them


@dataclass(frozen=True, slots=True)
class FrameTransform:
    """Resizes frames as the checkpoint's processor does, in uint8; picklable, so that it runs in the data workers.

    Attributes:
        image_size: Side in pixels of the square that comes out.
        resampling: "bicubic" or "bilinear", antialiased.
        is_cropped: Resize the shorter side and cut the centre (CLIP) instead of squeezing both sides (SigLIP).
    """

    image_size: int
    resampling: str = "bicubic"
    is_cropped: bool = False

    def __call__(self, frames: Tensor) -> Tensor:
        """Resized frames, uint8 (F, 3, h, w) -> uint8 (F, 3, image_size, image_size)."""
        size, (height, width) = self.image_size, frames.shape[-2:]
        if not self.is_cropped:
            return self._resize(frames, size, size)
        short = min(height, width)
        rows, columns = int(size * height / short), int(size * width / short)
        resized = self._resize(frames, rows, columns)
        top, left = (rows - size) // 2, (columns - size) // 2
        return resized[..., top : top + size, left : left + size].contiguous()

    def _resize(self, frames: Tensor, rows: int, columns: int) -> Tensor:
        if frames.shape[-2:] == (rows, columns):
            return frames
        return F.interpolate(frames, (rows, columns), mode=self.resampling, antialias=True)


@dataclass(frozen=True, slots=True)
class Normalization:
    """Mean and standard deviation a channel, of pixels in 0…1."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


def read_processor(folder: Path, image_size: int, default: Normalization, *, is_cropped: bool) -> tuple[FrameTransform, Normalization]:
    """Transform and normalisation of a checkpoint, from its `preprocessor_config.json` where there is one.

    Args:
        folder: The checkpoint.
        image_size: Side that the position embeddings are for.
        default: The family's values.
        is_cropped: The family's habit, when the file is silent.
    """
    file = folder / "preprocessor_config.json"
    values: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    transform = FrameTransform(
        image_size=image_size,
        resampling=_RESAMPLING.get(values.get("resample", 3), "bicubic"),
        is_cropped=bool(values.get("do_center_crop", is_cropped)),
    )
    mean, std = values.get("image_mean", default.mean), values.get("image_std", default.std)
    return transform, Normalization(tuple(mean), tuple(std))


def load_tower(tower_class: Any, folder: Path, dtype: torch.dtype) -> nn.Module:
    """The vision tower in `folder`, every weight out of the checkpoint.

    Args:
        tower_class: Of transformers.
        folder: Checkpoint in Hugging Face layout.
        dtype: Of the weights.

    Raises:
        UserError: There are no weights, or they are another architecture's; transformers would fill gaps with random numbers.
    """
    from safetensors import SafetensorError

    try:
        tower, loading = tower_class.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    except (ValueError, OSError, RuntimeError, SafetensorError) as error:
        reason = f"could not be loaded as {tower_class.__name__} ({str(error).splitlines()[0]})"
        raise UserError(f"encoder.checkpoint {folder} {reason}; check encoder.family, or take a whole checkpoint") from error
    missing = sorted(name for name in loading["missing_keys"] if not name.startswith("head."))  # the pooling head is not used
    if missing:
        raise UserError(
            f"encoder.checkpoint {folder} lacks {len(missing)} weights of {tower_class.__name__}, first: {missing[0]}; "
            "check encoder.family, or take a whole checkpoint"
        )
    return cast(nn.Module, tower)


class VisionEncoder(nn.Module):
    """A vision tower of transformers behind one interface.

    Args:
        tower: Called with `pixel_values` and `output_hidden_states`.
        transform: What the data workers apply to frames.
        normalization: Applied here, on the device.
        grid: (h, w) patches of a frame.
        num_prefix_tokens: CLS and register tokens in front of the patches, dropped.
        feature_layer: Index into the hidden states; -1 is after the last block.

    Raises:
        UserError: There is no such layer.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        tower: nn.Module,
        *,
        transform: FrameTransform,
        normalization: Normalization,
        grid: tuple[int, int],
        num_prefix_tokens: int,
        feature_layer: int,
    ) -> None:
        super().__init__()
        self.tower, self.transform, self.grid = tower, transform, grid
        self.num_prefix_tokens, self.feature_layer = num_prefix_tokens, feature_layer
        self.embed_dim = int(tower.config.hidden_size)  # type: ignore[union-attr,arg-type]
        num_layers = int(tower.config.num_hidden_layers)  # type: ignore[union-attr,arg-type]
        if not -num_layers - 1 <= feature_layer <= num_layers:
            raise UserError(f"encoder.feature_layer must be in {-num_layers - 1}…{num_layers} for this encoder, not {feature_layer}")
        self.register_buffer("mean", torch.tensor(normalization.mean).view(3, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(normalization.std).view(3, 1, 1) * 255, persistent=False)

    @property
    def num_patches(self) -> int:
        """P."""
        return self.grid[0] * self.grid[1]

    def forward(self, frames: Tensor) -> Tensor:
        """Patch features, uint8 (B, F, 3, H, W) -> (B, F, P, Dv)."""
        batch, num_frames = frames.shape[:2]
        dtype = next(self.tower.parameters()).dtype
        pixels = (frames.flatten(0, 1).to(self.mean.dtype) - self.mean) / self.std
        hidden = self.tower(pixel_values=pixels.to(dtype), output_hidden_states=True).hidden_states[self.feature_layer]
        patches = hidden[:, self.num_prefix_tokens :]
        assert patches.shape[1] == self.num_patches, f"{patches.shape[1]} patches, {self.num_patches} expected"
        return patches.reshape(batch, num_frames, self.num_patches, self.embed_dim)
