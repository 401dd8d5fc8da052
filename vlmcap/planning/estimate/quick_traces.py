"""Traces of a whole table of combinations, interpolated between few."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vlmcap.planning.estimate.meta_models import PROMPT_TOKENS, text_config
from vlmcap.planning.estimate.sizes import Sizes
from vlmcap.planning.estimate.traces import Tracer

if TYPE_CHECKING:
    from vlmcap.planning.estimate.interpolation import Anchors
    from vlmcap.planning.estimate.stages import StageTrace

_FEW, _MANY = 4096, 24576  # tokens of a batch that the language model is traced at
NO_SIZES = Sizes((1, 1, 1), 0, 1, 0, 1, (1,), 0)  # where only the language model is asked for


class QuickTracer(Tracer):
    """Traces of which those of the language model are the same for all encoders, and those of the projector for all batch sizes."""

    @property
    def width(self) -> int:
        """Of the language model's hidden states."""
        return int(text_config(self.config).hidden_size)

    def projector(self, num_clips: int) -> StageTrace:
        """Features to visual tokens, from one and two clips."""
        from vlmcap.planning.estimate.interpolation import clips_of

        return clips_of(super().projector(1), super().projector(2), num_clips)

    def language(self, num_clips: int, num_caption: int, num_kept: int = 0) -> StageTrace:
        """Interpolated by tokens and blocks; with kept layers, traced as ever."""
        if num_kept:
            return super().language(num_clips, num_caption, num_kept)
        num_tokens = num_clips * (self.sizes.num_visual + PROMPT_TOKENS + num_caption)
        return self.anchors(num_caption).at(num_tokens, self.depth - self.short("language"), num_clips)

    def anchors(self, num_caption: int) -> Anchors:
        """The traces of the language model, the same for all sizes of this configuration."""
        from vlmcap.planning.estimate.interpolation import Anchors

        text, has_more = PROMPT_TOKENS + num_caption, num_caption > 0 and self.config.data.batch_size > 1
        few = max(_FEW, 4 * text)
        base, wide = self._with_visual(few - text), self._with_visual(few + _MANY - text)
        return Anchors(
            num_tokens=few,
            num_more_tokens=few + _MANY,
            short=base.shallow_language(1, num_caption),
            longer=base.shallow_language(1, num_caption, 1),
            wide=wide.shallow_language(1, num_caption),
            wide_longer=None if num_caption and self.config.hardware.gradient_checkpointing else wide.shallow_language(1, num_caption, 1),
            doubled=self._with_visual(few // 2 - text).shallow_language(2, num_caption) if has_more else None,
        )

    def _with_visual(self, num_visual: int) -> Tracer:
        sizes = Sizes((1, 1, num_visual), 0, 1, 0, num_visual, (num_visual,), 0)
        return Tracer(self.config, self.has_flash, sizes)
