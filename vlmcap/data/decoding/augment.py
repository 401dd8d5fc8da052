"""Changes of a clip's frames that leave its captions true.

There are no flips: captions say 왼쪽 and 오른쪽, and writing in the picture would no longer be what they quote. Hues
stay too, since captions name colours.

Legend: F frames, H/W pixels.
"""

from __future__ import annotations

import math

import torch
from numpy.random import Generator
from torch import Tensor

from vlmcap.config import AugmentConfig

_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601
_MEAN_STEP = 4  # the mean grey is that of every fourth pixel of every fourth row
_ROWS = 64  # recoloured at a time: a third of the time of whole frames at 1080p


def augment_frames(frames: Tensor, augment: AugmentConfig, rng: Generator) -> Tensor:
    """Frames after a random cut and with random colours, the same for all frames of a clip, so that its motion stays.

    Six numbers are always drawn from `rng`, so that switching one change on leaves the other as it was.

    Args:
        frames: uint8 (F, 3, H, W).
        augment: `color`: brightness, contrast and saturation are multiplied by factors within 1 ± `color`, each drawn
            for itself.
            `crop`: up to this share of the height and of the width is cut off, the same share of both; where is drawn
                for each.
        rng: Source of chance.

    Returns:
        uint8 (F, 3, H', W'); the frames themselves where everything is off.
    """
    share, top, left, *factors = rng.random(6).tolist()
    if augment.crop:
        frames = crop_frames(frames, share * augment.crop, top, left)
    if augment.color:
        frames = recolor_frames(frames, *(1 + augment.color * (2 * factor - 1) for factor in factors))
    return frames


def crop_frames(frames: Tensor, share: float, top: float, left: float) -> Tensor:
    """Frames without `share` of their height and width.

    `top` and `left`, 0 to 1, say how much of that goes at the start.
    """
    height, width = frames.shape[-2:]
    kept_height, kept_width = math.ceil(height * (1 - share)), math.ceil(width * (1 - share))
    first_row, first_column = round(top * (height - kept_height)), round(left * (width - kept_width))
    return frames[..., first_row : first_row + kept_height, first_column : first_column + kept_width]


def recolor_frames(frames: Tensor, brightness: float, contrast: float, saturation: float) -> Tensor:
    """Frames with colours scaled by three factors, 1 being no change; uint8 (F, 3, H, W) to the same.

    Contrast is about the mean grey of the whole clip, saturation about each pixel's own grey. All three are linear, so
    they are one matrix and one offset, and values are cut off at 0 and 255 once.
    """
    luma = torch.tensor(_LUMA)
    mean_grey = float(luma @ frames[..., ::_MEAN_STEP, ::_MEAN_STEP].float().mean(dim=(0, 2, 3)))
    scale = brightness * contrast
    matrix = scale * (saturation * torch.eye(3) + (1 - saturation) * luma.expand(3, 3))
    offset = torch.full((3, 1), (1 - contrast) * brightness * mean_grey)
    changed = torch.empty(frames.shape, dtype=torch.uint8)
    for frame, target in zip(frames, changed, strict=True):
        for rows, out in zip(
            frame.split(_ROWS, dim=1), target.split(_ROWS, dim=1), strict=True
        ):  # as float32 in the processor's cache
            out.copy_(torch.addmm(offset, matrix, rows.reshape(3, -1).float()).round_().clamp_(0, 255).view(rows.shape))
    return changed
