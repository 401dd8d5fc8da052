"""One stage of a training step (encoder, projector or language model), run on fake tensors and counted.

A model's blocks are alike, so two short traces, one of a block more than the other, say what any number of them takes:
every figure of a trace is linear in the depth, as each belongs to one moment of the step (in front of the blocks, in
the first, in the last, behind them).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import _engine_run_backward

from vlmcap.models.precision import autocast
from vlmcap.planning.estimate.live_bytes import LiveBytes, OnCard, tag_module

Bytes = Mapping[str, float]
"""Tag to bytes."""

_PER_BLOCK = "gradients"  # the tag that goes by blocks alone
_TAGS = {"attn": "attention", "attention": "attention", "mlp": "feed-forward", "feed_forward": "feed-forward"}


@dataclass(frozen=True, slots=True)
class StageMemory:
    """What a stage takes; bytes by tag, those of its weights apart.

    Attributes:
        weights: By what they are: frozen, quantisation state, trained.
        num_trained: Trained parameters.
        peaks: Moment ("forward first", "backward last", ...) -> bytes of the stage itself at its peak.
        retained: Behind the forward pass: what the way back needs, and the output.
        left: Behind the backward pass: gradients of the weights and of the input.
        flops: Of forward and backward pass.
        launches: Kernels launched by the forward pass.
    """

    weights: Bytes
    num_trained: float
    peaks: Mapping[str, Bytes]
    retained: Bytes
    left: Bytes
    flops: float
    launches: float

    def plain(self) -> dict[str, Any]:
        """As JSON takes it."""
        return asdict(self)


def extrapolate(short: StageMemory, longer: StageMemory, num_more: int) -> StageMemory:
    """The trace of `num_more` blocks more than `short` has; `longer` has one more."""
    times = num_more

    def line(a: float, b: float) -> float:
        return a + times * (b - a)

    def lines(a: Bytes, b: Bytes) -> Bytes:
        return {tag: line(a.get(tag, 0), b.get(tag, 0)) for tag in {**a, **b}}

    return StageMemory(
        weights=lines(short.weights, longer.weights),
        num_trained=line(short.num_trained, longer.num_trained),
        peaks={moment: lines(peak, longer.peaks[moment]) for moment, peak in short.peaks.items()},
        retained=lines(short.retained, longer.retained),
        left=lines(short.left, longer.left),
        flops=line(short.flops, longer.flops),
        launches=line(short.launches, longer.launches),
    )


def extrapolate_kept(
    base: StageMemory, again: StageMemory, kept: StageMemory, num_again: int, num_kept: int
) -> StageMemory:
    """The trace of a model some of whose blocks are computed again and the last ones kept.

    Args:
        base: Of some blocks of either kind.
        again: With one more that is computed again.
        kept: With one more that is kept.
        num_again: Blocks that are computed again, more than `base` has.
        num_kept: Blocks that are kept, more than `base` has.
    """
    along, across = extrapolate(base, again, num_again), extrapolate(base, kept, num_kept)

    def both(first: Bytes, second: Bytes, own: Bytes) -> Bytes:
        return {tag: first.get(tag, 0) + second.get(tag, 0) - own.get(tag, 0) for tag in {**first, **second}}

    return StageMemory(
        weights=both(along.weights, across.weights, base.weights),
        num_trained=along.num_trained + across.num_trained - base.num_trained,
        peaks={moment: both(along.peaks[moment], across.peaks[moment], peak) for moment, peak in base.peaks.items()},
        retained=both(along.retained, across.retained, base.retained),
        left=both(along.left, across.left, base.left),
        flops=along.flops + across.flops - base.flops,
        launches=along.launches + across.launches - base.launches,
    )


@dataclass(frozen=True, slots=True)
class Anchors:
    """Traces to interpolate between, for a language model with any number of tokens, blocks and labels.

    At a fixed moment of a step without padding every figure is a constant, a share a token, a share a block and token,
    a share a block and a share a row of labels. Under checkpointing gradients and weights alone go by blocks, and one
    trace less does.

    Attributes:
        num_tokens: Of `short`, `longer` and `doubled`.
        num_more_tokens: Of `wide`.
        short: As few blocks as may stand for all.
        longer: One block more.
        wide: More tokens.
        wide_longer: More tokens and one block more; None where what a block keeps goes by tokens, but for gradients and
            weights.
        doubled: As many tokens in two clips, so twice the labels; None where there are none.
    """

    num_tokens: int
    num_more_tokens: int
    short: StageMemory
    longer: StageMemory
    wide: StageMemory
    wide_longer: StageMemory | None = None
    doubled: StageMemory | None = None

    def at(self, num_tokens: float, num_more: int, num_clips: int = 1) -> StageMemory:
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
            block = _sum(
                [(1 - times, self.longer), (times - 1, self.short), (times, self.wide_longer), (-times, self.wide)]
            )
        return _sum([*terms, (num_more, block)])


def clips_of(one: StageMemory, two: StageMemory, num_clips: int) -> StageMemory:
    """The trace of so many clips, of which none sees another."""
    return {1: one, 2: two}.get(num_clips) or extrapolate(one, two, num_clips - 1)


def _sum(terms: Sequence[tuple[float, StageMemory]]) -> StageMemory:
    def lines(parts: Sequence[Bytes]) -> dict[str, float]:
        tags = {tag: None for part in parts for tag in part}
        return {
            tag: sum(times * part.get(tag, 0) for (times, _), part in zip(terms, parts, strict=True)) for tag in tags
        }

    traces = [trace for _, trace in terms]
    moments: Mapping[str, None] = {moment: None for trace in traces for moment in trace.peaks}
    return StageMemory(
        weights=lines([trace.weights for trace in traces]),
        num_trained=sum(times * trace.num_trained for times, trace in terms),
        peaks={
            moment: lines([trace.peaks.get(moment, {}) for trace in traces])
            for moment in moments
            if "middle" not in moment
        },
        retained=lines([trace.retained for trace in traces]),
        left=lines([trace.left for trace in traces]),
        flops=sum(times * trace.flops for times, trace in terms),
        launches=sum(times * trace.launches for times, trace in terms),
    )


def _grown(block: StageMemory, ratio: float) -> StageMemory:
    def lines(part: Bytes) -> dict[str, float]:
        return {tag: size if tag == _PER_BLOCK else ratio * size for tag, size in part.items()}

    return StageMemory(
        weights=block.weights,
        num_trained=block.num_trained,
        peaks={moment: lines(peak) for moment, peak in block.peaks.items()},
        retained=lines(block.retained),
        left=lines(block.left),
        flops=ratio * block.flops,
        launches=block.launches,
    )


def weights_of(module: nn.Module) -> Counter[str]:
    """Bytes of parameters and buffers, by what they are."""
    total: Counter[str] = Counter()
    seen: set[int] = set()
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if id(tensor) not in seen:
            seen.add(id(tensor))
            kind = (
                "quantisation state"
                if "quantization_state" in name
                else "trained weights"
                if tensor.requires_grad
                else "frozen weights"
            )
            total[kind] += tensor.numel() * tensor.element_size()
    return total


def blocks_of(module: nn.Module, depth: int) -> nn.ModuleList:
    """The list of the model's blocks."""
    return next(child for child in module.modules() if isinstance(child, nn.ModuleList) and len(child) == depth)


def profile_stage(
    module: nn.Module,
    forward: Callable[[], Tensor],
    *,
    mode: FakeTensorMode,
    blocks: Sequence[nn.Module] = (),
    inputs: Sequence[Tensor] = (),
    dtype: torch.dtype | None,
    has_flash: bool = True,
    has_backward: bool = True,
    num_kept: int = 0,
) -> StageMemory:
    """The trace of one forward pass and, where asked for, one backward pass.

    Args:
        module: Filled with fake tensors, in training mode where that matters.
        forward: Runs it; a loss, or an output whose gradient is given from outside.
        mode: Of the fake tensors.
        blocks: Its blocks.
        inputs: Tensors that another stage counts; the gradients of those that require one belong to this stage.
        dtype: Of autocast; None is none.
        has_flash: Whether the GPU has fused attention for grouped queries.
        has_backward: Whether anything in front of, or in, the stage is trained.
        num_kept: Last blocks that are not computed again where others are.
    """
    live, stage = LiveBytes(), _Stage(blocks, num_kept)
    live.exclude([*module.parameters(), *module.buffers(), *inputs])
    stage.mark(module, live)
    with mode, live, OnCard(live, has_flash), torch.set_grad_enabled(has_backward):
        live.enter("forward start")
        with autocast("cpu", dtype):
            output = forward()
        retained = live.snapshot()
        launches = live.launches
    left: Bytes = {}
    if has_backward:
        stage.is_forward = False
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(_owner_of_gradient(live))
        with mode:
            gradient = torch.empty_like(output)  # the next stage counts it
        live.exclude([gradient])
        with mode, live, OnCard(live, has_flash):
            live.tag = "backward"
            live.enter("backward start")
            # What torch.autograd.backward calls; inside of that one, OnCard would be off, as inside of any function
            # that a mode sees.
            _engine_run_backward((output,), (gradient,), False, False, (), allow_unreachable=True, accumulate_grad=True)
            del output
            left = dict(live.snapshot())
    num_trained = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
    peaks = {moment: dict(peak) for moment, peak in live.peaks.items() if moment != "start"}
    return StageMemory(dict(weights_of(module)), num_trained, peaks, dict(retained), left, live.flops, launches)


class _Stage:
    """Names the moments of a stage while it runs, and to what the tensors belong that its modules make."""

    def __init__(self, blocks: Sequence[nn.Module], num_kept: int) -> None:
        self.blocks, self.num_kept, self.is_forward = blocks, num_kept, True

    def _place(self, index: int) -> str:
        """Where a block stands; "turn" is the last one that is computed again, where others behind it are not."""
        names = {len(self.blocks) - 1 - self.num_kept: "turn"} if self.num_kept else {}
        return (names | {0: "first", len(self.blocks) - 1: "last"}).get(index, "middle")

    def mark(self, module: nn.Module, live: LiveBytes) -> None:
        for name, child in module.named_modules():
            leaf = name.rsplit(".", 1)[-1]
            if tag := next((tag for key, tag in _TAGS.items() if key in leaf), None):
                tag_module(child, live, tag)
        for index, block in enumerate(self.blocks):
            tag_module(block, live, "hidden states")
            self._mark_block(block, live, self._place(index))

    def _mark_block(self, block: nn.Module, live: LiveBytes, place: str) -> None:
        def begin(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not self.is_forward:
                return
            live.enter(f"forward {place}")
            hidden = args[0] if args else kwargs["hidden_states"]
            if place == "first" and hidden.requires_grad and not hidden.is_leaf:
                hidden.register_hook(lambda _: live.enter("backward end"))

        def end(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            if not self.is_forward:
                return
            if hidden.requires_grad:
                hidden.register_hook(lambda _: live.enter(f"backward {place}"))
            if place == "last":
                live.tag = "head and loss"  # no hook on the head: the chunked loss wants it bare
                live.enter("forward end")

        block.register_forward_pre_hook(begin, with_kwargs=True)
        block.register_forward_hook(end)


def _owner_of_gradient(live: LiveBytes) -> Callable[[Tensor], None]:
    def own(tensor: Tensor) -> None:
        assert tensor.grad is not None
        live.own(tensor.grad, "gradients")

    return own
