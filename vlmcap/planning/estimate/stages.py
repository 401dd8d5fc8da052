"""Profiles one stage of a training step (encoder, projector or language model) with fake tensors.

A model's blocks are alike, so two short profiles, one with a block more than the other, give any depth: every figure
is linear in the depth, as each belongs to one moment of the step (before the blocks, in the first, in the last, after
them).
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
from vlmcap.planning.estimate.live_bytes import CudaEmulationMode, LiveBytes, tag_module

Bytes = Mapping[str, float]
"""Tag to bytes."""

_PER_BLOCK = "gradients"  # tag whose bytes depend on the blocks, but not on the tokens
_TAGS = {"attn": "attention", "attention": "attention", "mlp": "feed-forward", "feed_forward": "feed-forward"}


@dataclass(frozen=True, slots=True)
class StageMemory:
    """Memory profile of a stage: bytes by tag, with its weights apart.

    Attributes:
        weights: Bytes by kind: frozen weights, quantisation state, trained weights.
        num_trained: Trained parameters.
        peaks: Moment ("forward first", "backward last", ...) to the bytes of the stage itself at its peak.
        retained: Bytes after the forward pass: what the backward pass needs, and the output.
        left: Bytes after the backward pass: gradients of the weights and of the input.
        flops: Floating-point operations of forward and backward pass.
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
        """Returns JSON-serialisable data."""
        return asdict(self)


def extrapolate(short: StageMemory, longer: StageMemory, num_more: int) -> StageMemory:
    """Returns the profile with `num_more` blocks more than `short`; `longer` has one more."""
    # short + num_more · (longer - short)
    return _weighted_sum([(1 - num_more, short), (num_more, longer)])


def extrapolate_kept(
    base: StageMemory, recomputed: StageMemory, kept: StageMemory, num_recomputed: int, num_kept: int
) -> StageMemory:
    """Returns the profile of a model whose last blocks are kept and whose other blocks are recomputed.

    Args:
        base: Profile with some blocks of either kind.
        recomputed: Profile with one more recomputed block.
        kept: Profile with one more kept block.
        num_recomputed: Recomputed blocks more than `base` has.
        num_kept: Kept blocks more than `base` has.
    """
    # base + num_recomputed · (recomputed - base) + num_kept · (kept - base)
    return _weighted_sum([(1 - num_recomputed - num_kept, base), (num_recomputed, recomputed), (num_kept, kept)])


@dataclass(frozen=True, slots=True)
class Anchors:
    """Profiles to interpolate between, for a language model with any number of tokens, blocks and labels.

    At a fixed moment of a step without padding, every figure is a constant plus shares per token, per block, per block
    and token, and per sequence of labels. Under checkpointing only gradients and weights depend on the blocks alone,
    and one profile less is needed.

    Attributes:
        num_tokens: Tokens of `short`, `longer` and `doubled`.
        num_more_tokens: Tokens of `wide`.
        short: Fewest blocks that represent all.
        longer: One block more.
        wide: More tokens.
        wide_longer: More tokens and one block more; None where all that a block keeps is proportional to tokens, except
            gradients and weights.
        doubled: As many tokens in two clips, so twice the labels; None without labels.
    """

    num_tokens: int
    num_more_tokens: int
    short: StageMemory
    longer: StageMemory
    wide: StageMemory
    wide_longer: StageMemory | None = None
    doubled: StageMemory | None = None

    def at(self, num_tokens: float, num_more: int, num_clips: int = 1) -> StageMemory:
        """Interpolates a profile.

        Args:
            num_tokens: Tokens of the batch.
            num_more: Blocks more than `short` has.
            num_clips: Clips whose captions give labels.
        """
        # 1. The fewest blocks, interpolated by tokens, with the labels of the other clips.
        # 0 at the anchor with few tokens, 1 at the one with more.
        times = (num_tokens - self.num_tokens) / (self.num_more_tokens - self.num_tokens)
        terms = [(1 - times, self.short), (times, self.wide)]
        if self.doubled is not None and num_clips > 1:
            # Each further clip adds the difference between two clips and one.
            terms += [(num_clips - 1, self.doubled), (1 - num_clips, self.short)]
        # 2. What one block adds at this number of tokens.
        if self.wide_longer is None:
            block = _scale_block(_weighted_sum([(1, self.longer), (-1, self.short)]), num_tokens / self.num_tokens)
        else:
            # The difference of one block, interpolated between few and more tokens.
            block = _weighted_sum(
                [(1 - times, self.longer), (times - 1, self.short), (times, self.wide_longer), (-times, self.wide)]
            )
        return _weighted_sum([*terms, (num_more, block)])


def extrapolate_clips(one: StageMemory, two: StageMemory, num_clips: int) -> StageMemory:
    """Returns the profile of `num_clips` clips, which are processed independently."""
    return {1: one, 2: two}.get(num_clips) or extrapolate(one, two, num_clips - 1)


def _weighted_sum(terms: Sequence[tuple[float, StageMemory]]) -> StageMemory:
    """Adds up profiles with factors, at the moments of the first one; a deeper one also has middle blocks."""
    profiles = [profile for _, profile in terms]

    def add(sizes: Sequence[Bytes]) -> dict[str, float]:
        tags = dict.fromkeys(tag for one in sizes for tag in one)
        return {tag: sum(times * one.get(tag, 0) for (times, _), one in zip(terms, sizes, strict=True)) for tag in tags}

    return StageMemory(
        weights=add([profile.weights for profile in profiles]),
        num_trained=sum(times * profile.num_trained for times, profile in terms),
        peaks={moment: add([profile.peaks.get(moment, {}) for profile in profiles]) for moment in profiles[0].peaks},
        retained=add([profile.retained for profile in profiles]),
        left=add([profile.left for profile in profiles]),
        flops=sum(times * profile.flops for times, profile in terms),
        launches=sum(times * profile.launches for times, profile in terms),
    )


def _scale_block(block: StageMemory, ratio: float) -> StageMemory:
    def scaled(sizes: Bytes) -> dict[str, float]:
        return {tag: size if tag == _PER_BLOCK else ratio * size for tag, size in sizes.items()}

    return StageMemory(
        weights=block.weights,
        num_trained=block.num_trained,
        peaks={moment: scaled(peak) for moment, peak in block.peaks.items()},
        retained=scaled(block.retained),
        left=scaled(block.left),
        flops=ratio * block.flops,
        launches=block.launches,
    )


def weight_bytes(module: nn.Module) -> Counter[str]:
    """Returns the bytes of parameters and buffers by kind."""
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


def find_blocks(module: nn.Module, depth: int) -> nn.ModuleList:
    """Returns the list of the model's blocks."""
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
    """Profiles one forward pass and, if requested, one backward pass.

    Args:
        module: Module with fake tensors, in training mode where that matters.
        forward: Runs it, and returns a loss, or an output whose gradient the next stage gives.
        mode: Mode of the fake tensors.
        blocks: Blocks of the module.
        inputs: Tensors that another stage counts; gradients of those that require one belong to this stage.
        dtype: Data type of autocast; None turns it off.
        has_flash: Whether the GPU has fused attention for grouped queries.
        has_backward: Whether anything in this stage, or in one before it, is trained.
        num_kept: Number of last blocks that are not recomputed where others are.
    """
    # 1. Forward pass, in moments that the hooks of the blocks name.
    live, hooks = LiveBytes(), _MomentHooks(blocks, num_kept)
    live.exclude([*module.parameters(), *module.buffers(), *inputs])
    hooks.register(module, live)
    with mode, live, CudaEmulationMode(live, has_flash), torch.set_grad_enabled(has_backward):
        live.enter("forward start")
        with autocast("cpu", dtype):
            output = forward()
        retained = live.snapshot()
        launches = live.launches
    # 2. Backward pass, from the gradient that the next stage would give.
    left: Bytes = {}
    if has_backward:
        hooks.is_forward = False
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(_gradient_hook(live))
        with mode:
            gradient = torch.empty_like(output)  # the next stage counts it
        live.exclude([gradient])
        with mode, live, CudaEmulationMode(live, has_flash):
            live.tag = "backward"
            live.enter("backward start")
            # torch.autograd.backward calls this. Inside of it CudaEmulationMode would be off, as in any function that a
            # mode intercepts.
            _engine_run_backward((output,), (gradient,), False, False, (), allow_unreachable=True, accumulate_grad=True)
            del output
            left = dict(live.snapshot())
    num_trained = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
    peaks = {moment: dict(peak) for moment, peak in live.peaks.items() if moment != "start"}
    return StageMemory(dict(weight_bytes(module)), num_trained, peaks, dict(retained), left, live.flops, launches)


class _MomentHooks:
    """Hooks that name the moments of a stage while it runs, and tag the tensors that its modules create."""

    def __init__(self, blocks: Sequence[nn.Module], num_kept: int) -> None:
        self.blocks, self.num_kept, self.is_forward = blocks, num_kept, True

    def _block_name(self, index: int) -> str:
        """Returns the position of a block: the first, the last, the last recomputed one, or one in the middle."""
        names = {len(self.blocks) - 1 - self.num_kept: "last recomputed"} if self.num_kept else {}
        return (names | {0: "first", len(self.blocks) - 1: "last"}).get(index, "middle")

    def register(self, module: nn.Module, live: LiveBytes) -> None:
        for name, child in module.named_modules():
            leaf = name.rsplit(".", 1)[-1]
            if tag := next((tag for key, tag in _TAGS.items() if key in leaf), None):
                tag_module(child, live, tag)
        for index, block in enumerate(self.blocks):
            tag_module(block, live, "hidden states")
            self._hook_block(block, live, self._block_name(index))

    def _hook_block(self, block: nn.Module, live: LiveBytes, position: str) -> None:
        def begin(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not self.is_forward:
                return
            live.enter(f"forward {position}")
            hidden = args[0] if args else kwargs["hidden_states"]
            # Its gradient is the end of the backward pass through the blocks.
            if position == "first" and hidden.requires_grad and not hidden.is_leaf:
                hidden.register_hook(lambda _: live.enter("backward end"))

        def end(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            if not self.is_forward:
                return
            if hidden.requires_grad:
                # The gradient of a block's output arrives just before its own backward pass.
                hidden.register_hook(lambda _: live.enter(f"backward {position}"))
            if position == "last":
                live.tag = "head and loss"  # no hook on the head, as a hook would turn the chunked loss off
                live.enter("forward end")

        block.register_forward_pre_hook(begin, with_kwargs=True)
        block.register_forward_hook(end)


def _gradient_hook(live: LiveBytes) -> Callable[[Tensor], None]:
    def tag_gradient(tensor: Tensor) -> None:
        assert tensor.grad is not None
        live.set_tag(tensor.grad, "gradients")

    return tag_gradient
