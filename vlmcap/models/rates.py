"""Learning rate schedules."""

from __future__ import annotations

import math


def cosine_rate(step: int, num_steps: int, *, peak: float, warmup_steps: int, final_ratio: float) -> float:
    """Returns the learning rate at `step`, from 0 to `num_steps` - 1.

    The rate rises linearly over `warmup_steps`, then follows half a cosine from `peak` to `final_ratio` · `peak`.
    """
    if step < warmup_steps:
        # The first step is not at 0, and the last warm-up step is at the peak.
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, num_steps - warmup_steps)
    # From 1 to `final_ratio` over half a cosine.
    return peak * (final_ratio + (1 - final_ratio) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))
