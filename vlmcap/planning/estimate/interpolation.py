"""What a language model takes at any number of tokens, blocks and labels, from few traces.

At a fixed moment of a step without padding every figure is a constant, a share a token, a share a block and token, a share a block and
a share a row of labels. Under checkpointing gradients and weights alone go by blocks, and one trace less does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vlmcap.planning.estimate.stages import Bytes, StageTrace, extrapolate

_PER_BLOCK = "gradients"  # the tag that goes by blocks alone


@dataclass(frozen=True, slots=True)
class Anchors:
    """Traces to interpolate between.

    Attributes:
        num_tokens: Of `short`, `longer` and `doubled`.
        num_more_tokens: Of `wide`.
        short: As few blocks as may stand for all.
        longer: One block more.
        wide: More tokens.
        wide_longer: More tokens and one block more; None where what a block keeps goes by tokens, but for gradients and weights.
        doubled: As many tokens in two clips, so twice the labels; None where there are none.
    """

    num_tokens: int
    num_more_tokens: int
    short: StageTrace
    longer: StageTrace
    wide: StageTrace
    wide_longer: StageTrace | None = None
    doubled: StageTrace | None = None

    def at(self, num_tokens: float, num_more: int, num_clips: int = 1) -> StageTrace:
        """The trace of a model.

        Args:
            num_tokens: Of the batch.
            num_more: Blocks beside those of `short`.
            num_clips: Whose captions give labels.
        """
        times = (num_tokens - self.num_tokens) / (self.num_more_tokens - self.num_tokens)
        terms = [(1 - times, self.short), (times, self.wide)]
        if self.doubled is not None and num_clips > 1:
            terms += [(num_clips - 1, self.doubled), (1 - num_clips, self.short)]
        if self.wide_longer is None:
            block = _grown(_sum([(1, self.longer), (-1, self.short)]), num_tokens / self.num_tokens)
        else:
            block = _sum([(1 - times, self.longer), (times - 1, self.short), (times, self.wide_longer), (-times, self.wide)])
        return _sum([*terms, (num_more, block)])


def clips_of(one: StageTrace, two: StageTrace, num_clips: int) -> StageTrace:
    """The trace of so many clips, of which none sees another."""
    return {1: one, 2: two}.get(num_clips) or extrapolate(one, two, num_clips - 1)


def _sum(terms: Sequence[tuple[float, StageTrace]]) -> StageTrace:
    def lines(parts: Sequence[Bytes]) -> dict[str, float]:
        tags = {tag: None for part in parts for tag in part}
        return {tag: sum(times * part.get(tag, 0) for (times, _), part in zip(terms, parts, strict=True)) for tag in tags}

    traces = [trace for _, trace in terms]
    moments: Mapping[str, None] = {moment: None for trace in traces for moment in trace.peaks}
    return StageTrace(
        weights=lines([trace.weights for trace in traces]),
        num_trained=sum(times * trace.num_trained for times, trace in terms),
        peaks={moment: lines([trace.peaks.get(moment, {}) for trace in traces]) for moment in moments if "middle" not in moment},
        retained=lines([trace.retained for trace in traces]),
        left=lines([trace.left for trace in traces]),
        flops=sum(times * trace.flops for times, trace in terms),
    )


def _grown(block: StageTrace, ratio: float) -> StageTrace:
    def lines(part: Bytes) -> dict[str, float]:
        return {tag: size if tag == _PER_BLOCK else ratio * size for tag, size in part.items()}

    return StageTrace(
        weights=block.weights,
        num_trained=block.num_trained,
        peaks={moment: lines(peak) for moment, peak in block.peaks.items()},
        retained=lines(block.retained),
        left=lines(block.left),
        flops=ratio * block.flops,
    )
