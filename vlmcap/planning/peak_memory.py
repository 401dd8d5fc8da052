"""Adds up the memory of the stages of a step: what is alive at each moment, and the peak."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vlmcap.planning.estimate.stages import Bytes, StageMemory

# Memory that the allocator holds beside tensors, as a share of all but weights, with expandable and fixed segments: the
# most in steps on captions of different lengths with PyTorch's allocator simulated (experiments/allocator).
EXPANDABLE_SHARE, FIXED_SHARE = 0.12, 0.55
_FRAGMENTATION = "fragmentation"
FLOAT = 4  # bytes of a trained float32 weight, and of its gradient
# Bytes per trained parameter: optimiser state between steps, and temporary memory during a step.
# 8-bit: two bytes and a scale per 256 values
OPTIMIZERS = {"adamw": (8, 4), "adamw_fused": (8, 0), "adamw_8bit": (2.04, 0)}


@dataclass(frozen=True, slots=True)
class Moment:
    """The fullest moment of a pass.

    Attributes:
        name: Name of the moment.
        sizes: Bytes of each entry, such as "encoder: weights" or "gradients", largest first.
    """

    name: str
    sizes: Mapping[str, float]

    @property
    def total(self) -> float:
        """Bytes that PyTorch reserves."""
        return sum(self.sizes.values())

    @property
    def allocated(self) -> float:
        """Bytes of tensors."""
        return self.total - self.sizes.get(_FRAGMENTATION, 0.0)


@dataclass(frozen=True, slots=True)
class ProfiledStage:
    """A named stage with its memory profile."""

    name: str
    memory: StageMemory


def is_weight(name: str) -> bool:
    """Returns whether an entry of `Moment.sizes` is weights or their quantisation state."""
    return name.endswith(("weights", "quantisation state"))


def is_known(name: str) -> bool:
    """Returns whether an entry follows from parameter counts alone: weights, quantisation state or optimiser state."""
    return is_weight(name) or name.endswith("optimiser state")


def activations(moment: Moment) -> float:
    """Returns the bytes that a step adds to weights, gradients and optimiser state."""
    kept = ("gradients", "optimiser state", _FRAGMENTATION)
    return sum(size for name, size in moment.sizes.items() if not is_weight(name) and name not in kept)


def weights(stages: Sequence[ProfiledStage]) -> Counter[str]:
    """Returns the bytes of the weights by stage and kind."""
    return Counter(
        {f"{stage.name}: {kind}": size for stage in stages for kind, size in stage.memory.weights.items() if size}
    )


def training_peak(
    stages: Sequence[ProfiledStage], held: Bytes, optimizer: str, *, accumulates: bool, unused_share: float = 0.0
) -> Moment:
    """Returns the fullest moment of a training step.

    Args:
        stages: Stages in the order of the forward pass, with their weights.
        held: Bytes that stay on the GPU throughout, such as frames or stored features.
        optimizer: A key of `OPTIMIZERS`.
        accumulates: Whether gradients of earlier micro-batches are there from the beginning.
        unused_share: Memory that the allocator cannot hand out, as a share of all but weights.
    """
    # 1. What is alive throughout, and the optimiser step, when no activations are left.
    num_trained = sum(stage.memory.num_trained for stage in stages)
    state, work = OPTIMIZERS[optimizer]
    always = weights(stages) + Counter(dict(held)) + Counter({"optimiser state": state * num_trained})
    moments = {"optimiser step": Counter({"gradients": FLOAT * num_trained, "optimiser step": work * num_trained})}
    # 2. Each moment of a stage, beside what earlier stages keep for their backward pass and, in the backward pass, the
    # gradients that later stages have left.
    for index, stage in enumerate(stages):
        before = _sum_stages((other.name, other.memory.retained) for other in stages[:index])
        behind = _sum_stages((other.name, other.memory.left) for other in stages[index + 1 :])
        for moment, peak in stage.memory.peaks.items():
            alive = before + _with_stage_name(stage.name, peak)
            if moment.startswith("backward"):
                alive += behind
            # Gradients of earlier micro-batches are alive in the whole step.
            if accumulates:
                alive["gradients"] = FLOAT * num_trained  # type: ignore[assignment]
            moments[f"{stage.name}, {moment}"] = alive
    name, fullest = max(moments.items(), key=lambda item: item[1].total())
    return Moment(name, _with_fragmentation(always, fullest, unused_share))


def kept_between_steps(stages: Sequence[ProfiledStage], optimizer: str) -> dict[str, float]:
    """Returns what a training run keeps while it captions: optimiser state, and the last step's gradients."""
    num_trained = sum(stage.memory.num_trained for stage in stages)
    return {"optimiser state": OPTIMIZERS[optimizer][0] * num_trained, "gradients": FLOAT * num_trained}


@dataclass(frozen=True, slots=True)
class Captioning:
    """Memory that captioning an evaluation batch takes in the language model.

    Attributes:
        prefill: Pass over the prompts, without gradients.
        validation: Pass for the validation loss of the same clips.
        token_bytes: Keys and values of one token in one slot.
        num_slots: Captions that are decoded at a time.
        num_prompts: Prompts of a prefill pass.
        prompt_tokens: Tokens of a prompt, including the visual ones.
        new_tokens: Most tokens of a caption.
        copied_share: Share of the keys and values that decoding a token copies, which are those of one block at a time.
        is_reserved: Whether the cache of all slots is allocated from the first prompt on, as new clips take free slots
            while other captions are being decoded.
    """

    prefill: StageMemory
    validation: StageMemory
    token_bytes: float
    num_slots: int
    num_prompts: int
    prompt_tokens: int
    new_tokens: int
    copied_share: float
    is_reserved: bool


def generation_peak(
    stages: Sequence[ProfiledStage],
    held: Bytes,
    work: Captioning,
    scores: Mapping[str, ProfiledStage],
    *,
    unused_share: float = 0.0,
) -> Moment:
    """Returns the fullest moment of evaluation.

    Candidates are prefill, the last token with the longest cache, the validation loss, and the models of scores.

    Args:
        stages: Stages of the training step: their weights, and the forward passes in front of the language model.
        held: Bytes that stay on the GPU throughout.
        work: Memory of captioning an evaluation batch.
        scores: Score name to the stage of its model, which runs after the captions are decoded.
        unused_share: Memory that the allocator cannot hand out, as a share of all but weights.
    """
    # 1. Forward passes of encoder and projector, beside the cache if it is reserved.
    always, last = weights(stages) + Counter(dict(held)), stages[-1].name
    # All slots at the length of the longest caption.
    cache = work.token_bytes * work.num_slots * (work.prompt_tokens + work.new_tokens)
    reserved: Counter[str] = Counter({"keys and values": cache}) if work.is_reserved else Counter()
    moments = {
        f"{stage.name}, {name}": _with_stage_name(stage.name, peak) + reserved
        for stage in stages[:-1]
        for name, peak in _forward_peaks(stage.memory)
    }
    # 2. The validation loss, prefill and the last token.
    moments |= {
        f"validation loss, {name}": _with_stage_name(last, peak) for name, peak in _forward_peaks(work.validation)
    }
    attention = f"{last}: attention"
    for name, peak in _forward_peaks(work.prefill):
        alive, cached = _with_stage_name(last, peak), work.token_bytes * work.num_prompts * work.prompt_tokens
        # The profile holds the keys and values of all blocks to its end, counted as attention.
        kept = min(cached, alive[attention]) if name in ("forward last", "forward end") else 0
        cache_entry = reserved if work.is_reserved else Counter({"keys and values": kept})
        moments[f"prompt, {name}"] = alive - Counter({attention: kept}) + cache_entry
    moments["last token"] = Counter({"keys and values": cache, "one block's copy of them": cache * work.copied_share})
    # 3. The models of scores, which are loaded after the captions are decoded.
    for name, stage in scores.items():
        score_weights = Counter({f"{name}: weights": sum(stage.memory.weights.values())})
        moments |= {
            f"{name}, {moment}": score_weights + _with_stage_name(name, peak)
            for moment, peak in _forward_peaks(stage.memory)
        }
    name, fullest = max(moments.items(), key=lambda item: item[1].total())
    return Moment(name, _with_fragmentation(always, fullest, unused_share))


def _forward_peaks(memory: StageMemory) -> list[tuple[str, Bytes]]:
    return [(name, peak) for name, peak in memory.peaks.items() if name.startswith("forward")]


def _with_stage_name(stage: str, sizes: Bytes) -> Counter[str]:
    """Prefixes the tags with the name of their stage; gradients of weights are one entry for all stages."""
    named: Counter[str] = Counter()
    for tag, size in sizes.items():
        named["gradients" if tag == "gradients" else f"{stage}: {tag}"] += size  # type: ignore[assignment]
    return named


def _sum_stages(stages: object) -> Counter[str]:
    total: Counter[str] = Counter()
    for name, sizes in stages:  # type: ignore[attr-defined]
        total += _with_stage_name(name, sizes)
    return total


def _with_fragmentation(always: Counter[str], fullest: Counter[str], unused_share: float) -> dict[str, float]:
    """Returns all entries, largest first, with the memory that the allocator holds beside them."""
    sizes = always + fullest
    # Weights are allocated once and leave no gaps.
    sizes[_FRAGMENTATION] = unused_share * fullest.total()  # type: ignore[assignment]
    return largest_first(sizes)


def largest_first(sizes: Bytes) -> dict[str, float]:
    """Returns the entries above zero, largest first."""
    return dict(sorted(((name, float(size)) for name, size in sizes.items() if size > 0), key=lambda item: -item[1]))


def scale_activations(moment: Moment, ratio: float) -> Moment:
    """Scales every entry whose bytes do not follow from parameter counts by a measured ratio."""
    if ratio == 1:
        return moment
    return Moment(moment.name, {name: size if is_known(name) else ratio * size for name, size in moment.sizes.items()})
