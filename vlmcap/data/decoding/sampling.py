"""Selection of the moments of a clip that the model sees, by `data.sampling`.

`uniform` takes the centres of equal segments; `random` draws a moment in each of them; `fps` takes one frame every
1 / fps seconds; `keyframe` takes the key frames of the stream; `adaptive` takes more frames where the picture changes.

Moments are seconds from the start of a clip, ascending. Lists of images have no clock: for them a moment counts images,
and the clip lasts as many seconds as it has images.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from vlmcap.config import DataConfig, Sampling

# Share of the adaptive moments that is spread evenly regardless of changes, so that a still scene is seen too.
_EVEN_SHARE = 0.2


def choose_moments(data: DataConfig, duration_s: float, rng: Generator | None = None) -> list[float]:
    """Returns moments of a clip by its duration alone, where its content is not needed or unknown.

    `keyframe` and `adaptive` then act like `uniform`, as does `random` without `rng`.
    """
    if data.sampling is Sampling.fps:
        moments = fps_moments(duration_s, data.fps, data.num_frames)
    elif data.sampling is Sampling.random and rng is not None:
        segment_s = duration_s / data.num_frames
        moments = [(i + float(share)) * segment_s for i, share in enumerate(rng.random(data.num_frames))]
    else:
        moments = uniform_moments(duration_s, data.num_frames)
    return jitter_moments(moments, data, duration_s, rng)


def jitter_moments(moments: list[float], data: DataConfig, duration_s: float, rng: Generator | None) -> list[float]:
    """Moves each moment by up to `data.augment.jitter` of a segment within the clip; no change without `rng`."""
    jitter = data.augment.jitter
    if rng is None or jitter == 0:
        return moments
    shifts = rng.uniform(-jitter, jitter, len(moments)) * duration_s / data.num_frames
    return sorted(
        min(max(0.0, moment + float(shift)), duration_s) for moment, shift in zip(moments, shifts, strict=True)
    )


def uniform_moments(duration_s: float, num_frames: int) -> list[float]:
    """Returns the centres of `num_frames` equal segments of a clip.

    They are centres and not edges, as the first and last frame of a clip are often black or a fade.
    """
    return [duration_s * (2 * i + 1) / (2 * num_frames) for i in range(num_frames)]


def fps_moments(duration_s: float, fps: float, num_frames: int) -> list[float]:
    """Returns the centres of intervals of 1 / fps seconds, evenly thinned to `num_frames`.

    A clip shorter than half an interval gives its middle.
    """
    count = math.ceil(duration_s * fps - 0.5)  # number of centres before the end
    if count < 1:
        return [duration_s / 2]
    return [(k + 0.5) / fps for k in spread(count, min(count, num_frames))]


def keyframe_moments(key_moments: Sequence[float], duration_s: float, num_frames: int) -> list[float]:
    """Returns `num_frames` key frames, evenly thinned; if there are fewer, middles of the longest gaps are added."""
    moments = [key_moments[i] for i in spread(len(key_moments), min(len(key_moments), num_frames))]
    while len(moments) < num_frames:
        edges = [0.0, *moments, duration_s]
        # The longest gap between neighbouring moments, or between one and an end of the clip.
        start, end = max(pairwise(edges), key=lambda gap: gap[1] - gap[0])
        moments = sorted([*moments, (start + end) / 2])
    return moments


def adaptive_moments(
    times: Sequence[float], changes: Sequence[float], duration_s: float, num_frames: int
) -> list[float]:
    """Returns the moments that divide the clip's change into `num_frames` equal shares, in the middle of each share.

    A fifth of the change is spread evenly over the clip, and all of it if nothing changes.

    Args:
        times: n ascending moments within the clip.
        changes: n - 1 non-negative differences between the pictures at neighbouring `times`.
        duration_s: Duration of the clip.
        num_frames: Number of moments.
    """
    knots = np.asarray([0.0, *times, duration_s])
    # Change that has accumulated up to each moment; it is 0 before the second picture.
    curve = np.concatenate([[0.0, 0.0], np.cumsum(changes, dtype=np.float64), [float(np.sum(changes))]])[: len(knots)]
    if len(times) < 2 or curve[-1] <= 0 or duration_s <= 0:
        return uniform_moments(duration_s, num_frames)
    share: NDArray[np.float64] = _EVEN_SHARE * knots / duration_s + (1 - _EVEN_SHARE) * curve / curve[-1]
    # The middles of equal shares, at which the curve is read backwards.
    wanted = (2 * np.arange(num_frames) + 1) / (2 * num_frames)
    return [float(moment) for moment in np.interp(wanted, share, knots)]


def spread(num_items: int, num_picks: int) -> list[int]:
    """Returns the middle indices of `num_picks` equal segments of `num_items` items; they repeat if items are fewer."""
    return [(2 * i + 1) * num_items // (2 * num_picks) for i in range(num_picks)]
