"""The interface of vision encoders, from frames to patch features, and the rules of families of vision towers.

Legend: B batch, F frames (tiles of a frame count as frames), N frames of all clips, P patches per frame (row-major over
the grid h × w), Dv vision width, S side of a frame in pixels; for video encoders, T steps in time, N clips.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmcap.errors import UserError
from vlmcap.models.encoders.classes import fixed_arguments, frame_size, pixels_argument, square_side
from vlmcap.models.encoders.layout import FinalNorm, Layout, as_tokens, find_final_norm, find_layout
from vlmcap.models.encoders.preprocessing import (
    ClipTransform,
    FrameTransform,
    Preprocessing,
    TileTransform,
    Transform,
    num_tiles,
)
from vlmcap.types import GridTHW


@dataclass(frozen=True, slots=True)
class EncoderOptions:
    """Options of an encoder.

    Attributes:
        feature_layer: Index into the hidden states that the transformers class returns, 0 before the first block. -1 is
            its `last_hidden_state`, which is after the final norm in classes that apply one (DINOv2, DINOv3, InternViT,
            ViT, AIMv2, …); for SigLIP and SigLIP 2 only, it is the last hidden state before the final norm.
        is_normed: Whether -1 is after the final norm for SigLIP and SigLIP 2, too.
        dtype: Dtype of the weights.
        image_size: Side of a frame in pixels; None uses that of the checkpoint.
        max_patches: Maximum patches per frame if sizes vary (NaFlex); ignored otherwise.
        max_tiles: Maximum tiles per frame, not counting the overview; 1 disables tiling.
        attention: Attention implementation, as named by transformers; falls back to "sdpa" if the class has no
            FlashAttention, and to "eager" if it has neither.
        mean: Mean per channel of pixels in 0…1, instead of the checkpoint's.
        std: Standard deviation per channel, likewise.
    """

    feature_layer: int
    dtype: torch.dtype
    is_normed: bool = False
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
    """Wraps a vision tower of transformers in the common interface of encoders.

    Args:
        tower: Vision tower whose last hidden state is that of `feature_layer`.
        transform: Transform that the data workers apply to frames.
        preprocessing: Mean and standard deviation, which the encoder applies on the device.
        grid: Patch grid (h, w) of a frame.
        feature_layer: Configured layer.
        embed_dim: Dv.
        num_prefix_tokens: Number of CLS and register tokens before the patches, which are dropped.
        arguments: Further keyword arguments of the tower's `forward`.
    """

    mean: Tensor
    std: Tensor
    frames_per_token = 1  # consecutive frames that a feature belongs to
    is_normed = False  # as in `EncoderOptions`

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
        # In the scale of uint8 pixels, so that frames are normalised without a division by 255 first.
        self.register_buffer("mean", torch.tensor(preprocessing.mean).view(3, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(preprocessing.std).view(3, 1, 1) * 255, persistent=False)

    @property
    def has_flash(self) -> bool:
        """Whether the class supports FlashAttention."""
        return bool(cast(Any, self.tower)._supports_flash_attn)

    @property
    def num_patches(self) -> int:
        """P; the maximum if grids vary."""
        return self.grid[0] * self.grid[1]

    def possible_grids(self, num_frames: int) -> Sequence[GridTHW]:
        """Returns all possible values of `grid_thw` for a clip of `num_frames` frames."""
        return [(num_frames * num_tiles(cuts), *self.grid) for cuts in range(1, self.max_tiles + 1)]

    def forward(self, frames: Tensor, grid_thw: Sequence[GridTHW] | None = None) -> Tensor:
        """Encodes clips to patch features, uint8 (B, F, 3, S, S) -> (B, F, P, Dv).

        Args:
            frames: Frames as returned by `transform`, padded at the end of F if clips have fewer.
            grid_thw: Size of each clip if sizes vary. Padding frames are not computed, and their features are zero.
        """
        batch, num_frames = frames.shape[:2]
        grids = [(num_frames, *self.grid)] * batch if grid_thw is None else grid_thw
        # Positions of real frames among all B · F; the others are padding and are not encoded.
        real = [clip * num_frames + frame for clip, (count, _, _) in enumerate(grids) for frame in range(count)]
        sizes = [(height, width) for count, height, width in grids for _ in range(count)]
        flat = frames.flatten(0, 1)  # (B, F, 3, S, S) -> (B · F, 3, S, S)
        if len(real) == len(flat):
            return self.encode(flat, sizes).unflatten(0, (batch, num_frames))  # (N, P, Dv) -> (B, F, P, Dv)
        index = on_device(real, frames.device)
        features = self.encode(flat[index], sizes)  # (N, 3, S, S) -> (N, P, Dv)
        padded = features.new_zeros(len(flat), *features.shape[1:]).index_copy(0, index, features)
        return padded.unflatten(0, (batch, num_frames))  # (B · F, P, Dv) -> (B, F, P, Dv)

    def encode(self, frames: Tensor, sizes: Sequence[tuple[int, int]]) -> Tensor:
        """Encodes single frames to patch features, uint8 (N, 3, S, S) -> (N, P, Dv).

        Args:
            frames: Real frames, without padding.
            sizes: Patch rows and columns of each frame; all equal the encoder's grid in this class.
        """
        # In place, as a batch of frames is large.
        pixels = frames.to(self.mean.dtype, copy=True).sub_(self.mean).div_(self.std)
        # (N, 3, S, S) -> (N, prefix + P, Dv)
        hidden = as_tokens(self.tower(pixel_values=pixels.to(self._dtype), **self.arguments).last_hidden_state)
        patches = hidden[:, self.num_prefix_tokens : self.num_prefix_tokens + self.num_patches]
        assert patches.shape[1] == self.num_patches, f"{patches.shape[1]} patches, {self.num_patches} expected"
        return patches

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.tower.parameters()).dtype


class VideoEncoder(VisionEncoder):
    """An encoder of whole clips, which joins consecutive frames to T = F / `frames_per_token` steps in time.

    Its steps take the place of frames in everything that reads features.

    Args:
        tower: See `VisionEncoder`.
        frames_per_token: Frames of a step.
        positions: (1, steps · P, Dv), positions of the longest clip if the class has those of one length only.
        **options: Further arguments of `VisionEncoder`.
    """

    positions: Tensor | None

    def __init__(
        self, tower: nn.Module, *, frames_per_token: int, positions: Tensor | None = None, **options: Any
    ) -> None:
        super().__init__(tower, **options)
        self.frames_per_token = frames_per_token
        self.register_buffer("positions", positions, persistent=False)
        self.arguments |= fixed_arguments(type(tower))

    def possible_grids(self, num_frames: int) -> Sequence[GridTHW]:
        """Returns the only possible (T, h, w) of a clip of `num_frames` frames.

        Raises:
            UserError: The frames do not fill whole tokens, or there are more than the tower has positions for.
        """
        steps, rest = divmod(num_frames, self.frames_per_token)
        if rest:
            raise UserError(
                f"this encoder joins {self.frames_per_token} frames to a token, so data.num_frames must be a multiple "
                f"of {self.frames_per_token}, not {num_frames}"
            )
        if self.positions is not None and steps * self.num_patches > self.positions.shape[1]:
            # Whole frames in the positions: steps × frames per step.
            longest = self.positions.shape[1] // self.num_patches * self.frames_per_token
            raise UserError(
                f"this encoder has positions for {longest} frames, so data.num_frames cannot be {num_frames}; lower it"
            )
        return [(steps, *self.grid)]

    def forward(self, frames: Tensor, grid_thw: Sequence[GridTHW] | None = None) -> Tensor:
        """Encodes clips to patch features, uint8 (B, F, 3, S, S) -> (B, T, P, Dv), with zeros for padding.

        Args:
            frames: Frames as returned by `transform`, padded at the end of F if clips have fewer.
            grid_thw: (T, h, w) of each clip; None if none is padded.
        """
        num_steps = frames.shape[1] // self.frames_per_token
        steps = [num_steps] * len(frames) if grid_thw is None else [count for count, _, _ in grid_thw]
        encoded: dict[int, Tensor] = {}
        for count in dict.fromkeys(steps):  # attention runs over a clip, so clips of one length are encoded together
            clips = [clip for clip, other in enumerate(steps) if other == count]
            selected = frames[on_device(clips, frames.device), : count * self.frames_per_token]
            features = self.encode(selected, ())  # (N, F, 3, S, S) -> (N, T, P, Dv)
            # (N, T, P, Dv) -> (N, steps of the longest clip, P, Dv)
            padded = F.pad(features, (0, 0, 0, 0, 0, num_steps - count))
            encoded |= dict(zip(clips, padded, strict=True))
        return torch.stack([encoded[clip] for clip in range(len(frames))])

    def encode(self, frames: Tensor, sizes: Sequence[tuple[int, int]]) -> Tensor:
        """Encodes clips of one length to patch features, uint8 (N, F, 3, S, S) -> (N, T, P, Dv)."""
        steps = frames.shape[1] // self.frames_per_token
        if self.positions is not None:
            embeddings: Any = self.tower.embeddings
            # Set before each call, as the class adds all of its positions to the tokens.
            embeddings.position_embeddings = self.positions[:, : steps * self.num_patches]
        pixels = frames.to(self.mean.dtype, copy=True).sub_(self.mean).div_(self.std).to(self._dtype)
        outputs = self.tower(**{pixels_argument(type(self.tower)): pixels}, **self.arguments)
        hidden: Tensor = outputs.last_hidden_state[:, self.num_prefix_tokens :]
        return hidden.unflatten(1, (steps, self.num_patches))  # (N, T · P, Dv) -> (N, T, P, Dv)


def on_device(numbers: Sequence[Any], device: torch.device) -> Tensor:
    """Copies numbers of the host to a device, without synchronisation."""
    # A copy from pinned memory does not wait for the device.
    return torch.tensor(numbers, pin_memory=torch.cuda.is_available()).to(device, non_blocking=True)


class Family:
    """Rules for a type of vision tower; the base class suits all types without special rules.

    Attributes:
        preprocessing: Preprocessing if the checkpoint has no processor file; None uses the values of the processor
            class in transformers.
        is_raw: Whether `feature_layer=-1` is before the final norm.
        has_flash: False if the class fails with FlashAttention although it claims support.
    """

    preprocessing: Preprocessing | None = None
    is_raw: bool = False
    has_flash: bool = True

    def config_values(self, values: Mapping[str, Any]) -> Mapping[str, Any]:
        """Translates the vision section of a `config.json` to the transformers class, without options we do not use."""
        return values

    def names(self, name: str) -> tuple[str, ...]:
        """Translates a tensor's name to transformers' names; several if the tensor holds several, stacked."""
        return (name,)

    def layout(self, config: Any) -> Layout:
        """Returns the layout of the tower's features.

        Raises:
            UnknownLayoutError: The tower returns no grid of patch features.
        """
        return find_layout(config)

    def final_norm(self, config: Any) -> FinalNorm | None:
        """Returns the module after the last block; None if a truncated tower does not give the hidden states."""
        return find_final_norm(config)

    def positions(self, config: Any, grid: tuple[int, int]) -> Tensor | None:
        """Returns the positions of the longest clip, (1, T · P, Dv), if the class has those of one length only."""
        return None

    def assemble(
        self, tower: nn.Module, config: Any, options: EncoderOptions, preprocessing: Preprocessing
    ) -> VisionEncoder:
        """Builds the encoder around a tower.

        Raises:
            UserError: The image size is not possible, or a video encoder shall tile.
        """
        layout = self.layout(config)
        size, arguments = _image_size(config, options, layout, preprocessing)
        grid = (size // layout.patch_size, size // layout.patch_size)
        resizing = (size, preprocessing.resampling, preprocessing.is_cropped, preprocessing.short_side_for(size))
        transform: Transform = FrameTransform(*resizing)
        if options.max_tiles > 1:
            transform = TileTransform(size, grid, options.max_tiles, preprocessing.resampling)
        build: Callable[..., VisionEncoder] = VisionEncoder
        if layout.frames_per_token:
            if options.max_tiles > 1:
                raise UserError(
                    f"encoder.tiling={options.max_tiles} is not possible, as this encoder joins consecutive frames; "
                    "set encoder.tiling=1"
                )
            transform = ClipTransform(*resizing, layout.frames_per_token, grid)
            positions = self.positions(config, grid)
            build = partial(VideoEncoder, frames_per_token=layout.frames_per_token, positions=positions)
        return build(
            tower,
            transform=transform,
            preprocessing=preprocessing,
            grid=grid,
            feature_layer=options.feature_layer,
            embed_dim=layout.embed_dim,
            num_prefix_tokens=layout.num_prefix_tokens,
            # Flags such as `interpolate_pos_encoding`, with which the tower takes another size.
            arguments=dict.fromkeys(arguments, True),
        )


def _image_size(
    config: Any, options: EncoderOptions, layout: Layout, preprocessing: Preprocessing
) -> tuple[int, tuple[str, ...]]:
    """Returns the side of a frame in pixels, and the arguments that the class needs for it.

    If the class supports any size, the processor file has priority over the configuration.
    """
    native = frame_size(config)
    native = None if native is None else square_side(native)
    default = (preprocessing.image_size or native) if layout.is_any_size or native is None else native
    size = default if options.image_size is None else options.image_size
    if size is None:
        raise UserError(
            "neither config.json nor a processor file of encoder.checkpoint states an image size; set "
            "encoder.image_size"
        )
    patch = layout.patch_size
    if size < patch:
        raise UserError(f"encoder.image_size={size} is less than one patch; the smallest possible is {patch}")
    # The size of the class itself needs no argument.
    if size == native:
        return size, ()
    # Other sizes by an argument such as `interpolate_pos_encoding`.
    if layout.arguments:
        return size, layout.arguments
    if not layout.is_any_size:
        raise UserError(
            f"encoder.image_size={size} is not possible, as this encoder has position embeddings for {native} pixels "
            "only; leave it out"
        )
    if size % patch:
        below = size // patch * patch
        raise UserError(
            f"encoder.image_size={size} is not a multiple of the patch size of {patch} pixels; set it to {below} or "
            f"{below + patch}"
        )
    return size, ()
