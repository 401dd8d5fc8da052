"""The stages of a step put together: what is alive at each moment, and the most of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vlmcap.planning.estimate.stages import Bytes, StageMemory

# What the allocator holds beside tensors, of all but weights, where its segments grow and where they have fixed sizes:
# at most so much in steps on captions of different lengths, with PyTorch's allocator simulated (experiments/allocator).
EXPANDABLE_SHARE, FIXED_SHARE = 0.12, 0.55
_UNUSED = "fragmentation"
FLOAT = 4  # bytes of a trained weight and of its gradient
# Bytes a trained parameter: kept between steps, and taken while one is made.
OPTIMIZERS = {"adamw": (8, 4), "adamw_fused": (8, 0), "adamw_8bit": (2.04, 0)}


@dataclass(frozen=True, slots=True)
class Moment:
    """The fullest moment of a pass.

    Attributes:
        name: Of the moment.
        parts: What to bytes, weights included, largest first.
    """

    name: str
    parts: Mapping[str, float]

    @property
    def total(self) -> float:
        """Bytes that are reserved."""
        return sum(self.parts.values())

    @property
    def allocated(self) -> float:
        """Bytes of tensors."""
        return self.total - self.parts.get(_UNUSED, 0.0)


@dataclass(frozen=True, slots=True)
class Stage:
    """A stage by its name."""

    name: str
    trace: StageMemory


def is_weight(part: str) -> bool:
    """Whether a part of a moment is weights or belongs to them."""
    return part.endswith(("weights", "quantisation state"))


def is_known(part: str) -> bool:
    """Whether a part's bytes follow from numbers of parameters alone: weights, quantisation state, optimiser state."""
    return is_weight(part) or part.endswith("optimiser state")


def activations(moment: Moment) -> float:
    """Bytes that a step adds to weights, gradients and optimiser state."""
    kept = ("gradients", "optimiser state", _UNUSED)
    return sum(size for name, size in moment.parts.items() if not is_weight(name) and name not in kept)


def weights(stages: Sequence[Stage]) -> Counter[str]:
    """Bytes of the weights, by stage and kind."""
    return Counter(
        {f"{stage.name}: {kind}": size for stage in stages for kind, size in stage.trace.weights.items() if size}
    )


def training_peak(
    stages: Sequence[Stage], held: Bytes, optimizer: str, *, accumulates: bool, unused_share: float = 0.0
) -> Moment:
    """The fullest moment of a training step.

    Args:
        stages: In the order of the forward pass, weights included.
        held: Bytes that lie on the GPU throughout, such as frames or stored features.
        optimizer: A key of `OPTIMIZERS`.
        accumulates: Gradients of earlier micro-batches are there from the beginning.
        unused_share: What the allocator cannot hand out, of all but weights.
    """
    num_trained = sum(stage.trace.num_trained for stage in stages)
    state, work = OPTIMIZERS[optimizer]
    always = weights(stages) + Counter(dict(held)) + Counter({"optimiser state": state * num_trained})
    moments = {"optimiser step": Counter({"gradients": FLOAT * num_trained, "optimiser step": work * num_trained})}
    for index, stage in enumerate(stages):
        before = _sum((other.name, other.trace.retained) for other in stages[:index])
        behind = _sum((other.name, other.trace.left) for other in stages[index + 1 :])
        for moment, peak in stage.trace.peaks.items():
            alive = before + _named(stage.name, peak)
            if moment.startswith("backward"):
                alive += behind
            if accumulates:
                alive["gradients"] = FLOAT * num_trained  # type: ignore[assignment]
            moments[f"{stage.name}, {moment}"] = alive
    name, fullest = max(moments.items(), key=lambda item: item[1].total())
    return Moment(name, _finish(always, fullest, unused_share))


def kept_between_steps(stages: Sequence[Stage], optimizer: str) -> dict[str, float]:
    """Bytes that a training run keeps while it captions.

    The optimiser's state, and the last step's gradients until the next one.
    """
    num_trained = sum(stage.trace.num_trained for stage in stages)
    return {"optimiser state": OPTIMIZERS[optimizer][0] * num_trained, "gradients": FLOAT * num_trained}


@dataclass(frozen=True, slots=True)
class Captioning:
    """What captions of an evaluation batch take in the language model.

    Attributes:
        prefill: Pass over the prompts, without gradients.
        validation: Pass for the loss of the same clips.
        token_bytes: Keys and values of one token of one row.
        num_rows: Rows that are written at a time.
        num_read: Prompts of that pass.
        prompt_tokens: Tokens of a prompt, visual ones included.
        new_tokens: Most tokens of a caption.
        copied_share: What a token copies of the keys and values, which are those of one block at a time.
        is_reserved: Whether the cache of all rows is there from the first prompt on, as newcomers come while others are
            written.
    """

    prefill: StageMemory
    validation: StageMemory
    token_bytes: float
    num_rows: int
    num_read: int
    prompt_tokens: int
    new_tokens: int
    copied_share: float
    is_reserved: bool


def generation_peak(
    stages: Sequence[Stage], held: Bytes, work: Captioning, scores: Mapping[str, Stage], *, unused_share: float = 0.0
) -> Moment:
    """The fullest moment of evaluation.

    The prompt's pass, the last token with the cache at its longest, the loss, or a model of a score.

    Args:
        stages: Of the training step: their weights, and the forward passes in front of the language model.
        held: As there.
        work: Captions of an evaluation batch.
        scores: Models of scores by their names, which run when the captions are written.
        unused_share: As there.
    """
    always, last = weights(stages) + Counter(dict(held)), stages[-1].name
    cache = work.token_bytes * work.num_rows * (work.prompt_tokens + work.new_tokens)
    reserved: Counter[str] = Counter({"keys and values": cache}) if work.is_reserved else Counter()
    moments = {
        f"{stage.name}, {name}": _named(stage.name, peak) + reserved
        for stage in stages[:-1]
        for name, peak in _forward(stage.trace)
    }
    moments |= {f"validation loss, {name}": _named(last, peak) for name, peak in _forward(work.validation)}
    attention = f"{last}: attention"
    for name, peak in _forward(work.prefill):
        alive, cached = _named(last, peak), work.token_bytes * work.num_read * work.prompt_tokens
        # The trace keeps the keys and values of all blocks until its end, among what attention made.
        kept = min(cached, alive[attention]) if name in ("forward last", "forward end") else 0
        own = reserved if work.is_reserved else Counter({"keys and values": kept})
        moments[f"prompt, {name}"] = alive - Counter({attention: kept}) + own
    moments["last token"] = Counter({"keys and values": cache, "one block's copy of them": cache * work.copied_share})
    for name, stage in scores.items():
        own = Counter({f"{name}: weights": sum(stage.trace.weights.values())})
        moments |= {f"{name}, {moment}": own + _named(name, peak) for moment, peak in _forward(stage.trace)}
    name, fullest = max(moments.items(), key=lambda item: item[1].total())
    return Moment(name, _finish(always, fullest, unused_share))


def _forward(trace: StageMemory) -> list[tuple[str, Bytes]]:
    return [(name, peak) for name, peak in trace.peaks.items() if name.startswith("forward")]


def _named(stage: str, parts: Bytes) -> Counter[str]:
    """Parts with the name of their stage; gradients of weights are one part of all stages."""
    named: Counter[str] = Counter()
    for tag, size in parts.items():
        named["gradients" if tag == "gradients" else f"{stage}: {tag}"] += size  # type: ignore[assignment]
    return named


def _sum(stages: object) -> Counter[str]:
    total: Counter[str] = Counter()
    for name, parts in stages:  # type: ignore[attr-defined]
        total += _named(name, parts)
    return total


def _finish(always: Counter[str], fullest: Counter[str], unused_share: float) -> dict[str, float]:
    """All parts, largest first, with what the allocator holds beside them."""
    parts = always + fullest
    parts[_UNUSED] = unused_share * fullest.total()  # type: ignore[assignment]
    return largest_first(parts)


def largest_first(parts: Bytes) -> dict[str, float]:
    """The parts that take anything, largest first."""
    return dict(sorted(((name, float(size)) for name, size in parts.items() if size > 0), key=lambda item: -item[1]))


def scale_beyond(moment: Moment, ratio: float) -> Moment:
    """The moment with all parts that are not known times a measured ratio."""
    if ratio == 1:
        return moment
    return Moment(moment.name, {name: size if is_known(name) else ratio * size for name, size in moment.parts.items()})
