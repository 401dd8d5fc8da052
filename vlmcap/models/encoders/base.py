"""What every vision encoder does: frames in, patch features out, sizes stated.

Legend: B batch, F frames (tiles of a frame count as frames), N frames of all clips, P patches a frame (row-major over
the grid h × w), Dv vision width, S side of a frame in pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from vlmcap.errors import UserError
from vlmcap.models.encoders.classes import square_side
from vlmcap.models.encoders.layout import FinalNorm, Layout, as_tokens, find_final_norm, find_layout
from vlmcap.models.encoders.preprocessing import FrameTransform, Preprocessing, TileTransform, Transform, num_tiles
from vlmcap.types import GridTHW


@dataclass(frozen=True, slots=True)
class EncoderOptions:
    """What may be chosen of an encoder.

    Attributes:
        feature_layer: Index into the hidden states that the class of transformers returns, 0 before the first block. -1
            is what the class returns as `last_hidden_state`, so it is behind a final norm where the class has one on
            the way (DINOv2, DINOv3, InternViT, ViT, AIMv2, …); only of SigLIP and SigLIP 2 it is the last hidden state
            before the final norm.
        dtype: Of the weights.
        image_size: Side of a frame in pixels; None is the checkpoint's own.
        max_patches: Budget a frame where sizes vary (NaFlex); others ignore it.
        max_tiles: Tiles that a frame may be cut into, the overview not counted; 1 cuts nothing.
        attention: Implementation in the words of transformers; "sdpa" where a class has no FlashAttention, "eager"
            without either.
        mean: Per channel, of pixels in 0…1, in place of the checkpoint's.
        std: Likewise.
    """

    feature_layer: int
    dtype: torch.dtype
    image_size: int | None = None
    max_patches: int = 256
    max_tiles: int = 1
    attention: str = "sdpa"
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        for key, value in (("max_patches", self.max_patches), ("tiling", self.max_tiles)):
            if value < 1:
                raise UserError(f"encoder.{key} must be at least 1, not {value}")


class VisionEncoder(nn.Module):
    """A vision tower of transformers behind one interface.

    Args:
        tower: Its last hidden state is the chosen one.
        transform: What the data workers apply to frames.
        preprocessing: Mean and standard deviation, applied here, on the device.
        grid: (h, w) patches of a frame.
        feature_layer: As configured.
        embed_dim: Dv.
        num_prefix_tokens: CLS and register tokens in front of the patches, dropped.
        arguments: Further ones of the tower's `forward`.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        tower: nn.Module,
        *,
        transform: Transform,
        preprocessing: Preprocessing,
        grid: tuple[int, int],
        feature_layer: int,
        embed_dim: int,
        num_prefix_tokens: int = 0,
        arguments: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.tower, self.transform, self.grid, self.feature_layer = tower, transform, grid, feature_layer
        self.num_prefix_tokens, self.arguments = num_prefix_tokens, dict(arguments or {})
        self.embed_dim = embed_dim
        self.max_tiles = transform.max_tiles if isinstance(transform, TileTransform) else 1
        self.register_buffer("mean", torch.tensor(preprocessing.mean).view(3, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(preprocessing.std).view(3, 1, 1) * 255, persistent=False)

    @property
    def has_flash(self) -> bool:
        """Whether the class runs with FlashAttention."""
        return bool(cast(Any, self.tower)._supports_flash_attn)

    @property
    def num_patches(self) -> int:
        """P, the largest where grids vary."""
        return self.grid[0] * self.grid[1]

    def possible_grids(self, num_frames: int) -> Sequence[GridTHW]:
        """Every `grid_thw` that a clip of `num_frames` frames may get."""
        return [(num_frames * num_tiles(cuts), *self.grid) for cuts in range(1, self.max_tiles + 1)]

    def forward(self, frames: Tensor, grid_thw: Sequence[GridTHW] | None = None) -> Tensor:
        """Patch features, uint8 (B, F, 3, S, S) -> (B, F, P, Dv).

        Args:
            frames: As `transform` returned them, padded at the end of F where clips have fewer.
            grid_thw: A clip each, where they vary; frames behind a clip's last are not computed, and zero in what is
                returned.
        """
        batch, num_frames = frames.shape[:2]
        grids = [(num_frames, *self.grid)] * batch if grid_thw is None else grid_thw
        real = [row * num_frames + frame for row, (count, _, _) in enumerate(grids) for frame in range(count)]
        sizes = [(height, width) for count, height, width in grids for _ in range(count)]
        flat = frames.flatten(0, 1)
        if len(real) == len(flat):
            return self.encode(flat, sizes).unflatten(0, (batch, num_frames))
        index = on_device(real, frames.device)
        features = self.encode(flat[index], sizes)
        padded = features.new_zeros(len(flat), *features.shape[1:]).index_copy(0, index, features)
        return padded.unflatten(0, (batch, num_frames))

    def encode(self, frames: Tensor, sizes: Sequence[tuple[int, int]]) -> Tensor:
        """Patch features of single frames, uint8 (N, 3, S, S) -> (N, P, Dv).

        Args:
            frames: None of them padding.
            sizes: Patch rows and columns of each; here all have the encoder's own.
        """
        pixels = frames.to(self.mean.dtype, copy=True).sub_(self.mean).div_(self.std)  # in place: large frames
        hidden = as_tokens(self.tower(pixel_values=pixels.to(self._dtype), **self.arguments).last_hidden_state)
        patches = hidden[:, self.num_prefix_tokens : self.num_prefix_tokens + self.num_patches]
        assert patches.shape[1] == self.num_patches, f"{patches.shape[1]} patches, {self.num_patches} expected"
        return patches

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.tower.parameters()).dtype


def on_device(numbers: Sequence[Any], device: torch.device) -> Tensor:
    """A tensor of the host's numbers on a device, which the host does not wait for."""
    return torch.tensor(numbers, pin_memory=torch.cuda.is_available()).to(device, non_blocking=True)


class Family:
    """Rules for a type of vision tower; these are for all that need none of their own.

    Attributes:
        preprocessing: Where the checkpoint has no processor file; None takes the values of the processor class in
            transformers.
        is_raw: `feature_layer=-1` is before the final norm.
        has_flash: False where the class cannot run with FlashAttention although it says so.
    """

    preprocessing: Preprocessing | None = None
    is_raw: bool = False
    has_flash: bool = True

    def config_values(self, values: Mapping[str, Any]) -> Mapping[str, Any]:
        """The vision part of a checkpoint's `config.json` in the words of transformers' class, less what our features need not."""
        return values

    def names(self, name: str) -> tuple[str, ...]:
        """Names, as transformers reads them, of a tensor of the checkpoint; several where it holds several, stacked."""
        return (name,)

    def layout(self, config: Any) -> Layout:
        """What the class makes of a picture.

        Raises:
            UnknownLayoutError: No grid of patch features.
        """
        return find_layout(config)

    def final_norm(self, config: Any) -> FinalNorm | None:
        """The module behind the last block, or None where cutting the tower gives no hidden state."""
        return find_final_norm(config)

    def assemble(
        self, tower: nn.Module, config: Any, options: EncoderOptions, preprocessing: Preprocessing
    ) -> VisionEncoder:
        """The encoder around a tower.

        Raises:
            UserError: There can be no such image size.
        """
        layout = self.layout(config)
        size, arguments = _image_size(config, options, layout, preprocessing)
        grid = (size // layout.patch_size, size // layout.patch_size)
        transform: Transform = FrameTransform(
            size, preprocessing.resampling, preprocessing.is_cropped, preprocessing.short_side_for(size)
        )
        if options.max_tiles > 1:
            transform = TileTransform(size, grid, options.max_tiles, preprocessing.resampling)
        return VisionEncoder(
            tower,
            transform=transform,
            preprocessing=preprocessing,
            grid=grid,
            feature_layer=options.feature_layer,
            embed_dim=layout.embed_dim,
            num_prefix_tokens=layout.num_prefix_tokens,
            arguments=dict.fromkeys(arguments, True),
        )


def _image_size(
    config: Any, options: EncoderOptions, layout: Layout, preprocessing: Preprocessing
) -> tuple[int, tuple[str, ...]]:
    """Side of a frame in pixels, and the arguments that the class needs for it.

    Where any size is possible the processor file decides.
    """
    own = getattr(config, "image_size", None)
    own = None if own is None else square_side(own)
    native = (preprocessing.image_size or own) if layout.is_any_size or own is None else own
    size = native if options.image_size is None else options.image_size
    if size is None:
        raise UserError(
            "neither config.json nor a processor file of encoder.checkpoint says its image size; set encoder.image_size"
        )
    patch = layout.patch_size
    if size == own:
        return size, ()
    if size < patch:
        raise UserError(f"encoder.image_size={size} is less than one patch; the smallest possible is {patch}")
    if layout.arguments:
        return size, layout.arguments
    if not layout.is_any_size:
        raise UserError(
            f"encoder.image_size={size} is not possible: this encoder has positions for {own} pixels alone; leave it "
            "out"
        )
    if size % patch:
        below = size // patch * patch
        raise UserError(
            f"encoder.image_size={size} is no multiple of the patch of {patch} pixels; take {below} or {below + patch}"
        )
    return size, ()
