"""Where visual tokens stand in the sequence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vlmcap.types import GridTHW


@dataclass(frozen=True, slots=True)
class VisualRun:
    """All visual tokens of a clip in one run; goes to the data workers, so it must pickle.

    Attributes:
        num_tokens: (F, (h, w)) -> V.
        own: Size of clips that come without one.
    """

    num_tokens: Callable[[int, tuple[int, int]], int]
    own: GridTHW

    def __call__(self, grid_thw: GridTHW | None) -> Sequence[int]:
        """The one run, as the number of its placeholders."""
        num_frames, height, width = grid_thw or self.own
        return (self.num_tokens(num_frames, (height, width)),)
