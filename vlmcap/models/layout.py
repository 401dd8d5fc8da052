"""Where visual tokens stand in the sequence, and the size of a clip that says how many they are."""

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


@dataclass(frozen=True, slots=True)
class StatedGrid:
    """Says the size of every clip, those on the encoder's own grid included, as clips may differ in frames alone; must pickle too.

    Attributes:
        varying: F, H and W of decoded frames -> a clip's size, or None for the encoder's own grid.
        grid: (h, w) of the encoder.
    """

    varying: Callable[[int, int, int], GridTHW | None]
    grid: tuple[int, int]

    def __call__(self, num_frames: int, height: int, width: int) -> GridTHW:
        """Size in patches of a clip of F frames of H × W pixels."""
        return self.varying(num_frames, height, width) or (num_frames, *self.grid)
