"""Which moments of a clip the model sees."""

from __future__ import annotations


def uniform_timestamps(duration_s: float, num_frames: int) -> list[float]:
    """The centres of `num_frames` equal segments of a clip, in seconds from its start, ascending.

    Centres rather than edges: the first and last frame of a clip are often black or a fade.

    Raises:
        ValueError: `num_frames` is below 1 or `duration_s` is negative.
    """
    if num_frames < 1:
        raise ValueError(f"num_frames must be at least 1, not {num_frames}")
    if duration_s < 0:
        raise ValueError(f"duration_s must not be negative, but is {duration_s}")
    return [duration_s * (2 * i + 1) / (2 * num_frames) for i in range(num_frames)]
