"""What stands between prefix and suffix of Qwen's prompts for a clip of a given size.

Legend: T temporal patches, h/w patch rows and columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from vlmcap.models.pretrained.qwen_merger import MergerSpec
from vlmcap.types import GridTHW

VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"


@dataclass(frozen=True)
class TimestampedRuns:
    """A run for each temporal patch with its time in front, as Qwen3-VL has it; the last end mark is the prompt's.

    Attributes:
        spec: Of the merger.
        tokenizer: Of the language model.
        frame_rate: Frames a second.
        frames_per_patch: Frames that share a temporal patch.
    """

    spec: MergerSpec
    tokenizer: Any
    frame_rate: float
    frames_per_patch: int
    _known: dict[str, tuple[int, ...]] = field(default_factory=dict, compare=False, repr=False)

    def time_s(self, index: int) -> float:
        """The middle between first and last frame of a temporal patch, in seconds from the start of the clip."""
        return (index * self.frames_per_patch + (self.frames_per_patch - 1) / 2) / self.frame_rate

    def __call__(self, grid_thw: GridTHW | None) -> Sequence[int | Sequence[int]]:
        """Time, start mark, placeholders and end mark of each temporal patch in turn; nothing without a clip."""
        runs: list[int | Sequence[int]] = []
        steps, *grid = grid_thw or (0, 0, 0)
        for index in range(steps):
            text = f"{VISION_END if index else ''}<{self.time_s(index):.1f} seconds>{VISION_START}"
            runs += [self._ids(text), self.spec.num_tokens(1, (grid[0], grid[1]))]
        return runs

    def _ids(self, text: str) -> tuple[int, ...]:
        if text not in self._known:
            self._known[text] = tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        return self._known[text]
