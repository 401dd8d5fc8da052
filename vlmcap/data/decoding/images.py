"""Images as clips: one image is a clip of one frame, an animation or a list of images is a clip of as many.

The frames of an animation count as equally long, as those of a list do.
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

# Formats that only hold pixels: others run programs (EPS) or are never pictures of a data set.
_FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
_ANIMATED = ("AVIF", "GIF", "PNG", "WEBP")  # several frames elsewhere are pages or thumbnails
_HEAD_BYTES = 16

AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # data workers are processes already, and threads do not outlive a fork


def is_image(stream: BinaryIO) -> bool:
    """Whether the first bytes are those of an image; names lie."""
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
    """uint8 (F', 3, H, W): the image, or sampled frames of an animation, turned as its EXIF data says."""
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
    """uint8 (F', 3, H, W): sampled images of a list, each scaled to the size of the first one sampled."""
    frames: list[NDArray[np.uint8]] = []
    for index in sample_indices(len(addresses), data, rng):
        file = MediaFile(addresses[index])
        with video_errors(file.name):
            check_deadline(deadline_s)
            with file.open_bytes() as stream, open_image(stream, limits) as image:
                frames.append(_to_rgb(image, frames[0].shape[1:] if frames else None))
    return torch.from_numpy(np.stack(frames))


def sample_indices(num_all: int, data: DataConfig, rng: Generator | None) -> list[int]:
    """Which of `num_all` equally long frames are sampled, ascending, each at most once.

    There is no clock and no stream: `fps`, `keyframe` and `adaptive` are `uniform`.
    """
    chosen = data if data.sampling is Sampling.random else dataclasses.replace(data, sampling=Sampling.uniform)
    moments = choose_moments(chosen, float(num_all), rng)
    return sorted({min(int(moment + 1e-9), num_all - 1) for moment in moments})


@contextmanager
def open_image(stream: BinaryIO, limits: DecodeLimits) -> Iterator[Image.Image]:
    """The open image, its pixels not read yet.

    Raises:
        VideoError: It has no pixels or more than `limits.max_pixels`.
    """
    try:
        image = Image.open(stream, formats=_FORMATS)
    except Image.DecompressionBombError as error:
        raise VideoError(f"it has far more than the allowed {limits.max_pixels} pixels") from error
    with image:
        check_size(image.width, image.height, limits.max_pixels)
        yield image


def count_frames(image: Image.Image) -> int:
    """How many frames an animation has; 1 for anything else."""
    return int(getattr(image, "n_frames", 1)) if image.format in _ANIMATED else 1


def _to_rgb(image: Image.Image, size: tuple[int, ...] | None = None) -> NDArray[np.uint8]:
    """uint8 (3, H, W), upright; `size` is (H, W) to scale to."""
    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I;16"):  # PIL would cut 16 bits off above 255 rather than scale them
        upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
    pixels = upright.convert("RGB")
    if size is not None and (pixels.height, pixels.width) != tuple(size):
        pixels = pixels.resize((size[1], size[0]), Image.Resampling.BICUBIC)
    return np.ascontiguousarray(np.asarray(pixels, dtype=np.uint8).transpose(2, 0, 1))
