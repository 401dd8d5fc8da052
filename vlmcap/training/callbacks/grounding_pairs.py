"""Which clip gets which other clip's video."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from vlmcap.types import Clip

_SAME_VIDEO, _SAME_CATEGORY = 1000, 1  # no number of the latter is worth one of the former


def swap_order(clips: Sequence[Clip], seed: int) -> list[int]:
    """A permutation: the index of the clip whose video each clip gets.

    No clip keeps its own; where it can be avoided, none gets its own video under another clip's name, nor one of its own category.

    Args:
        clips: At least two.
        seed: Of the choice among the permutations that do.
    """
    assert len(clips) > 1
    shuffled = np.random.default_rng(seed).permutation(len(clips)).tolist()
    by_category = len({clip.category for clip in clips}) > 1
    groups: list[str | tuple[str, ...]] = [clip.category if by_category else _video(clip) for clip in clips]
    # Groups, and videos in them, stand together in the order in which the shuffle meets them first.
    first: dict[tuple[object, ...], int] = {
        key: place for place, index in reversed([*enumerate(shuffled)]) for key in (("group", groups[index]), _video(clips[index]))
    }
    placed = sorted(shuffled, key=lambda index: (first["group", groups[index]], first[_video(clips[index])]))
    # Turned by the size of the largest group nobody meets their own, unless that group is more than half of all.
    turn = max(Counter(groups).values()) % len(clips) or 1
    order = [0] * len(clips)
    for place, index in enumerate(placed):
        order[index] = placed[(place + turn) % len(placed)]
    return _mend(clips, order)


def cost(clip: Clip, other: Clip) -> int:
    """How bad it is to give a clip the video of another."""
    if _video(clip) == _video(other):
        return _SAME_VIDEO
    return _SAME_CATEGORY if clip.category and clip.category == other.category else 0


def _mend(clips: Sequence[Clip], order: list[int]) -> list[int]:
    """Exchanges between two clips as long as one makes it better."""
    costs = [cost(clip, clips[other]) for clip, other in zip(clips, order, strict=True)]
    is_better = True
    while is_better and any(costs):
        is_better = False
        for one in [index for index, value in enumerate(costs) if value]:
            for two in range(len(clips)):
                if order[two] == one or order[one] == two:
                    continue
                new = cost(clips[one], clips[order[two]]), cost(clips[two], clips[order[one]])
                if sum(new) < costs[one] + costs[two]:
                    order[one], order[two] = order[two], order[one]
                    costs[one], costs[two] = new
                    is_better = True
    return order


def _video(clip: Clip) -> tuple[str, ...]:
    return ("video", *(clip.frames or (clip.video,)))
