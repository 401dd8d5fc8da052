"""Images as clips: an image is a clip of one frame, an animation or a list of images is a clip of several.

All frames of an animation count as equally long, like those of a list.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import BinaryIO

import numpy as np
import torch
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import AvifImagePlugin, Image, ImageOps
from torch import Tensor

from vlmcap.config import DataConfig, Sampling
from vlmcap.data.decoding.container import DecodeLimits, MediaFile, VideoError, check_deadline, check_size, video_errors
from vlmcap.data.decoding.sampling import choose_moments

# Formats that contain only pixels; others run programs (EPS) or are never pictures of a data set.
_FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
_ANIMATED = ("AVIF", "GIF", "PNG", "WEBP")  # in other formats several frames are pages or thumbnails
_HEAD_BYTES = 16

AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # data workers are processes already, and threads do not survive a fork


def is_image(stream: BinaryIO) -> bool:
    """Returns whether the first bytes are those of an image, since file names can be wrong."""
    head = stream.read(_HEAD_BYTES)
    stream.seek(0)
    is_riff_webp = head[:4] == b"RIFF" and head[8:12] == b"WEBP"
    is_avif = head[4:12] in (b"ftypavif", b"ftypavis")
    return (
        is_riff_webp
        or is_avif
        or head.startswith((b"\xff\xd8\xff", b"\x89PNG\r\n", b"GIF8", b"BM", b"II*\0", b"MM\0*"))
    )


def read_image(
    stream: BinaryIO, data: DataConfig, rng: Generator | None, limits: DecodeLimits, deadline_s: float
) -> Tensor:
    """Reads an image, or sampled frames of an animation, rotated by its EXIF data; uint8 (F', 3, H, W)."""
    frames = []
    with open_image(stream, limits) as image:
        num_all = count_frames(image)
        for index in sample_indices(num_all, data, rng):
            check_deadline(deadline_s)
            if num_all > 1:
                image.seek(index)
            frames.append(_to_rgb(image))
    return torch.from_numpy(np.stack(frames))


def read_image_list(
    addresses: Sequence[str], data: DataConfig, rng: Generator | None, limits: DecodeLimits, deadline_s: float
) -> Tensor:
    """Reads sampled images of a list, scaled to the size of the first one sampled; uint8 (F', 3, H, W)."""
    frames: list[NDArray[np.uint8]] = []
    for index in sample_indices(len(addresses), data, rng):
        file = MediaFile(addresses[index])
        with video_errors(file.name):
            check_deadline(deadline_s)
            with file.open_bytes() as stream, open_image(stream, limits) as image:
                frames.append(_to_rgb(image, frames[0].shape[1:] if frames else None))
    return torch.from_numpy(np.stack(frames))


def sample_indices(num_all: int, data: DataConfig, rng: Generator | None) -> list[int]:
    """Returns which of `num_all` equally long frames are sampled, ascending, each at most once.

    Without a clock and a stream, `fps`, `keyframe` and `adaptive` act like `uniform`.
    """
    chosen = data if data.sampling is Sampling.random else dataclasses.replace(data, sampling=Sampling.uniform)
    moments = choose_moments(chosen, float(num_all), rng)
    # Against centres that fall just below a whole number.
    return sorted({min(int(moment + 1e-9), num_all - 1) for moment in moments})


@contextmanager
def open_image(stream: BinaryIO, limits: DecodeLimits) -> Iterator[Image.Image]:
    """Opens an image without reading its pixels.

    Raises:
        VideoError: The image has no pixels or more than `limits.max_pixels`.
    """
    try:
        image = Image.open(stream, formats=_FORMATS)
    except Image.DecompressionBombError as error:
        raise VideoError(f"it has far more than the allowed {limits.max_pixels} pixels") from error
    with image:
        check_size(image.width, image.height, limits.max_pixels)
        yield image


def count_frames(image: Image.Image) -> int:
    """Returns the number of frames of an animation; 1 for anything else."""
    return int(getattr(image, "n_frames", 1)) if image.format in _ANIMATED else 1


def _to_rgb(image: Image.Image, size: tuple[int, ...] | None = None) -> NDArray[np.uint8]:
    """Returns an upright image, uint8 (3, H, W); `size` is (H, W) to scale to."""
    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I;16"):  # PIL would clip 16 bits at 255 instead of scaling them
        # The upper byte of 16 bits.
        upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
    pixels = upright.convert("RGB")
    if size is not None and (pixels.height, pixels.width) != tuple(size):
        pixels = pixels.resize((size[1], size[0]), Image.Resampling.BICUBIC)
    return np.ascontiguousarray(np.asarray(pixels, dtype=np.uint8).transpose(2, 0, 1))  # (H, W, 3) -> (3, H, W)
