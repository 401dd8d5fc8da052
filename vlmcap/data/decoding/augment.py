"""Augmentation of frames that keeps captions true.

Frames are not flipped: captions mention 왼쪽 and 오른쪽, and they quote writing in the picture. Hues are kept too,
since captions name colours.

Legend: F frames, H/W pixels.
"""

from __future__ import annotations

import math

import torch
from numpy.random import Generator
from torch import Tensor

from vlmcap.config import AugmentConfig

_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601
_MEAN_STEP = 4  # the mean grey is taken from every fourth pixel of every fourth row
_NUM_ROWS = 64  # image rows recoloured at a time; takes a third of the time of whole frames at 1080p


def augment_frames(frames: Tensor, augment: AugmentConfig, rng: Generator) -> Tensor:
    """Crops and recolour frames at random; all frames of a clip get the same change, so that its motion is kept.

    Six numbers are always drawn from `rng`, so that enabling one change does not affect the other.

    Args:
        frames: uint8 (F, 3, H, W).
        augment: `color`: brightness, contrast and saturation are multiplied by independent factors within 1 ± `color`.
            `crop`: up to this share is cropped, the same share of height and width, at independent positions.
        rng: Random number generator.

    Returns:
        uint8 (F, 3, H', W'); the frames themselves if nothing is enabled.
    """
    # Drawn in one call, so that switching one change off does not alter the random numbers of the others.
    share, top, left, *factors = rng.random(6).tolist()
    if augment.crop:
        frames = crop_frames(frames, share * augment.crop, top, left)
    if augment.color:
        # 0…1 -> 1 - color … 1 + color
        frames = recolor_frames(frames, *(1 + augment.color * (2 * factor - 1) for factor in factors))
    return frames


def crop_frames(frames: Tensor, share: float, top: float, left: float) -> Tensor:
    """Crops `share` of the height and width of frames; `top` and `left`, 0 to 1, give the share of it at the start."""
    height, width = frames.shape[-2:]
    kept_height, kept_width = math.ceil(height * (1 - share)), math.ceil(width * (1 - share))
    first_row, first_column = round(top * (height - kept_height)), round(left * (width - kept_width))
    return frames[..., first_row : first_row + kept_height, first_column : first_column + kept_width]


def recolor_frames(frames: Tensor, brightness: float, contrast: float, saturation: float) -> Tensor:
    """Scales the colours of uint8 (F, 3, H, W) frames by three factors, where 1 means no change.

    Contrast is relative to the mean grey of the whole clip, saturation to each pixel's own grey. All three are linear,
    so they are one matrix and one offset, and values are clipped to 0 and 255 only at the end.
    """
    luma = torch.tensor(_LUMA)
    mean_grey = float(luma @ frames[..., ::_MEAN_STEP, ::_MEAN_STEP].float().mean(dim=(0, 2, 3)))
    scale = brightness * contrast
    # Saturation mixes each channel with the luma, (3, 3); contrast and brightness scale the result.
    matrix = scale * (saturation * torch.eye(3) + (1 - saturation) * luma.expand(3, 3))
    # Contrast pulls towards the mean grey, and brightness scales that too.
    offset = torch.full((3, 1), (1 - contrast) * brightness * mean_grey)
    changed = torch.empty(frames.shape, dtype=torch.uint8)
    for frame, target in zip(frames, changed, strict=True):
        # A few rows at a time, as float32 in the processor's cache.
        for rows, out in zip(frame.split(_NUM_ROWS, dim=1), target.split(_NUM_ROWS, dim=1), strict=True):
            pixels = rows.reshape(3, -1).float()  # (3, rows, W) -> (3, rows * W)
            out.copy_(torch.addmm(offset, matrix, pixels).round_().clamp_(0, 255).view(rows.shape))
    return changed
