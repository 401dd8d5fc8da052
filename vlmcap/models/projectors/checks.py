"""What a projector cannot be, each refusal in one sentence."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from vlmcap.errors import UserError

if TYPE_CHECKING:
    from vlmcap.models.projectors.spec import ProjectorSpec

_COUNTS = (
    "depth", "num_layers", "num_heads", "num_queries", "shuffle", "pool_size", "resample_size", "frame_stack", "window"
)  # fmt: skip


def check_spec(spec: ProjectorSpec) -> None:
    """`UserError` if a setting is out of range or two of them exclude each other."""
    _check_ranges(spec)
    _check_heads(spec)
    _check_queries(spec)
    _check_reducer(spec)
    _check_time(spec)


def _check_ranges(spec: ProjectorSpec) -> None:
    for name in _COUNTS:
        if getattr(spec, name) < 1:
            raise UserError(f"projector.{name} must be at least 1, not {getattr(spec, name)}")
    if spec.num_global < 0:
        raise UserError(f"projector.num_global must not be negative, not {spec.num_global}")
    if not 0 < spec.keep_ratio <= 1:
        raise UserError(f"projector.keep_ratio must be above 0 and at most 1, not {spec.keep_ratio}")
    if spec.hidden_dim is not None and spec.hidden_dim < 1:
        raise UserError(f"projector.hidden_dim must be at least 1, or null for the encoder's width, not {spec.hidden_dim}")


def _check_heads(spec: ProjectorSpec) -> None:
    is_rotary = spec.temporal == "local_global"
    step = spec.num_heads * (2 if is_rotary else 1)
    if not spec.has_heads or spec.inner_dim % step == 0:
        return
    wanted = "twice projector.num_heads, as temporal=local_global needs heads of even width" if is_rotary else "projector.num_heads"
    raise UserError(
        f"projector.hidden_dim={spec.hidden_dim} is no multiple of {wanted} ({step}); "
        f"set projector.hidden_dim={math.ceil(spec.inner_dim / step) * step} or null"
    )


def _check_queries(spec: ProjectorSpec) -> None:
    if spec.queries == "prompt":
        if spec.kind != "cross_attention":
            raise UserError(f"projector.queries=prompt is for projector=cross_attention, not {spec.kind}; set projector.queries=learned")
        if not spec.num_prompt_tokens:
            raise UserError("projector.queries=prompt needs a question, and there is none; set llm.prompt, or projector.queries=learned")
    if spec.kind == "c_abstractor" and math.isqrt(spec.num_queries) ** 2 != spec.num_queries:
        raise UserError(
            f"projector=c_abstractor gives a square of tokens a frame, which projector.num_queries={spec.num_queries} is not; "
            f"set it to {round(math.sqrt(spec.num_queries)) ** 2}"
        )


def _check_reducer(spec: ProjectorSpec) -> None:
    if not spec.chooses_tokens:
        return
    if spec.frame_stack > 1:
        raise UserError(
            f"projector.reducer={spec.reducer} keeps other places in each frame, so frames cannot be stacked behind it; "
            "set projector.frame_stack=1, or projector.reducer=pool"
        )
    if spec.kind in ("c_abstractor", "pixel_shuffle"):
        raise UserError(
            f"projector={spec.kind} needs the grid of patches that projector.reducer={spec.reducer} takes apart; "
            "set projector.reducer to none, pool or resample, or choose another projector"
        )
    if spec.temporal == "attention":
        raise UserError(
            f"projector.temporal=attention follows one place through time, and projector.reducer={spec.reducer} keeps other places "
            "in each frame; set projector.temporal to none, position or local_global"
        )


def _check_time(spec: ProjectorSpec) -> None:
    if spec.num_frames % spec.frame_stack:
        raise UserError(
            f"projector.frame_stack={spec.frame_stack} does not divide data.num_frames={spec.num_frames}; set one to a divisor of the other"
        )
    if spec.temporal == "attention" and spec.reads_clip:
        tokens = "projector=perceiver" if spec.kind == "perceiver" else "projector.queries=prompt"
        raise UserError(
            f"projector.temporal=attention follows one place through time, but the tokens of {tokens} belong to the whole clip; "
            "set projector.temporal to none, position or local_global"
        )
