"""What the data workers do to decoded frames, in uint8, as the checkpoint's own image processor does it.

Legend: F frames, T tiles a frame, H/W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmcap.types import GridTHW


def resize(frames: Tensor, rows: int, columns: int, resampling: str) -> Tensor:
    """Antialiased frames of another size, uint8 (F, 3, H, W) -> uint8 (F, 3, rows, columns)."""
    if frames.shape[-2:] == (rows, columns):
        return frames
    return F.interpolate(frames, (rows, columns), mode=resampling, antialias=True)


@dataclass(frozen=True, slots=True)
class FrameTransform:
    """Frames as squares of one size; picklable, so that it runs in the data workers.

    Attributes:
        image_size: Side in pixels of the square that comes out.
        resampling: "bicubic" or "bilinear", antialiased.
        is_cropped: Resize the shorter side and cut the centre (CLIP) instead of squeezing both sides (SigLIP).
        short_side: Pixels of the shorter side before the cut; None is `image_size`.
    """

    image_size: int
    resampling: str = "bicubic"
    is_cropped: bool = False
    short_side: int | None = None

    def __call__(self, frames: Tensor) -> Tensor:
        """Resized frames, uint8 (F, 3, H, W) -> uint8 (F, 3, image_size, image_size)."""
        size, (height, width) = self.image_size, frames.shape[-2:]
        if not self.is_cropped:
            return resize(frames, size, size, self.resampling)
        target, short = self.short_side or size, min(height, width)
        resized = resize(frames, int(target * height / short), int(target * width / short), self.resampling)
        top, left = (resized.shape[-2] - size) // 2, (resized.shape[-1] - size) // 2
        return resized[..., top : top + size, left : left + size].contiguous()

    def grid_thw(self, num_frames: int, height: int, width: int) -> GridTHW | None:
        """None: every clip has the encoder's own grid."""
        return None


@dataclass(frozen=True, slots=True)
class TileTransform:
    """Frames cut into square tiles, as InternVL's dynamic resolution does (Chen et al., https://arxiv.org/abs/2404.16821, section 3.3).

    The layout is the one, of those with at most `max_tiles` tiles, whose aspect ratio is closest to the frame's. The whole frame,
    squeezed into one more tile, comes last, unless there is only one tile.

    Attributes:
        image_size: Side of a tile in pixels.
        grid: (h, w) patches of a tile.
        max_tiles: The overview not counted.
        resampling: "bicubic" or "bilinear", antialiased.
    """

    image_size: int
    grid: tuple[int, int]
    max_tiles: int
    resampling: str = "bicubic"

    def __call__(self, frames: Tensor) -> Tensor:
        """Tiles, uint8 (F, 3, H, W) -> uint8 (F · T, 3, image_size, image_size): row-major within a frame, frame after frame."""
        size = self.image_size
        rows, columns = self.layout(*frames.shape[-2:])
        resized = resize(frames, rows * size, columns * size, self.resampling)
        tiles = resized.unflatten(-2, (rows, size)).unflatten(-1, (columns, size)).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
        if rows * columns > 1:
            overview = resize(frames, size, size, self.resampling)
            tiles = torch.cat([tiles, overview[:, None]], dim=1)
        return tiles.flatten(0, 1).contiguous()

    def grid_thw(self, num_frames: int, height: int, width: int) -> GridTHW | None:
        """Frames times tiles, and the grid of a tile, of a clip of height × width pixels."""
        rows, columns = self.layout(height, width)
        return num_frames * num_tiles(rows * columns), *self.grid

    def layout(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of tiles for a frame of height × width pixels."""
        # The module that needs no torchvision; ties between layouts are broken as there.
        from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

        columns, rows = get_optimal_tiled_canvas((height, width), (self.image_size, self.image_size), 1, self.max_tiles)
        return int(rows), int(columns)


def num_tiles(num_cuts: int) -> int:
    """Tiles a frame, the overview counted, of a frame cut into `num_cuts`."""
    return num_cuts + (num_cuts > 1)


@dataclass(frozen=True, slots=True)
class PatchTransform:
    """Frames of their own aspect ratio cut into patches, within a budget (NaFlex, https://arxiv.org/abs/2502.14786, section 2.4.2).

    Attributes:
        patch_size: Side of a patch in pixels.
        max_patches: Budget a frame; what comes out is padded to it.
        resampling: "bicubic" or "bilinear", antialiased.
    """

    patch_size: int
    max_patches: int
    resampling: str = "bilinear"

    def __call__(self, frames: Tensor) -> Tensor:
        """Patches, row-major, uint8 (F, 3, H, W) -> uint8 (F, max_patches, 3 · p · p), zeros behind the last real patch."""
        size, (rows, columns) = self.patch_size, self.layout(*frames.shape[-2:])
        resized = resize(frames, rows * size, columns * size, self.resampling)
        cells = resized.unflatten(-2, (rows, size)).unflatten(-1, (columns, size))  # (F, 3, h, p, w, p)
        patches = cells.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
        return F.pad(patches, (0, 0, 0, self.max_patches - rows * columns))

    def grid_thw(self, num_frames: int, height: int, width: int) -> GridTHW | None:
        """Frames, patch rows and columns of a clip of height × width pixels."""
        return num_frames, *self.layout(height, width)

    def layout(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches for a frame of height × width pixels."""
        from transformers.models.siglip2.image_processing_pil_siglip2 import get_image_size_for_max_num_patches

        rows, columns = get_image_size_for_max_num_patches(height, width, self.patch_size, self.max_patches)
        return int(rows) // self.patch_size, int(columns) // self.patch_size


Transform = FrameTransform | TileTransform | PatchTransform
