"""Makes the plan of a configuration from its architecture alone: peak memory, time and disk space."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vlmcap.assembly.components import dtype_of, lora_of
from vlmcap.config import Batching, Config, Enforce, Engine, Strategy
from vlmcap.errors import DoesNotFitError, NotPlannedError, UserError
from vlmcap.models.decoding.settings import prompt_batch_size
from vlmcap.planning.calibration import calibrated_device
from vlmcap.planning.caption_lengths import CaptionLengths
from vlmcap.planning.captioning import (
    MAX_SLOTS,
    UNPACKED_BYTES,
    CaptionPlan,
    clip_bytes,
    feature_values,
    packed_bytes,
    plan_captions,
    stages_in_front,
    stored_bytes,
    unused_share,
    ways_to_merge,
)
from vlmcap.planning.hardware import GIB, DeviceInfo, detect_cpu, device_info
from vlmcap.planning.host_memory import HostBatch, host_peak, host_sentence, pinned_bytes
from vlmcap.planning.peak_memory import Moment, ProfiledStage, activations, scale_activations, training_peak
from vlmcap.planning.plan import Plan

if TYPE_CHECKING:
    from vlmcap.planning.estimate.memory_profiler import MemoryProfiler

# About the number of training clips of AI Hub's Korean background video, where the data is not there and data.max_clips
# is not set.
NUM_CLIPS = 8000


def make_plan(
    config: Config,
    device: DeviceInfo | None = None,
    memory_profiler: MemoryProfiler | None = None,
    *,
    captions: CaptionLengths | None = None,
    num_clips: int | None = None,
) -> Plan:
    """Makes the plan of a configuration.

    Args:
        config: Run configuration.
        device: Device to plan for; None takes that of the hardware profile, with the figures measured on it.
        memory_profiler: Memory profiler of the same configuration; None makes an exact one.
        captions: Lengths of the training captions, where they are known; None assumes those of Korean captions.
        num_clips: Number of training clips, where it is known; None takes data.max_clips, or about as many as AI Hub's
            data set has.

    Raises:
        UserError: The components do not fit together, or an architecture is not known.
        NotPlannedError: The memory of this combination cannot be predicted.
    """
    _check_plannable(config)
    # Loads bitsandbytes, which a run without a plan does not need.
    from vlmcap.planning.estimate.memory_profiler import MemoryProfiler
    from vlmcap.planning.estimate.sizes import download_bytes

    # 1. Profile the stages of a training step, and the models of scores.
    device = device or calibrated_device(config)
    memory_profiler = memory_profiler or MemoryProfiler(config, device.has_flash)
    captions = captions or CaptionLengths.assumed(config.llm.caption_tokens)
    num_kept = kept_within(config, memory_profiler)
    batch_size, _ = fullest_batch(config, memory_profiler, captions)
    stages = training_stages(config, memory_profiler, num_kept, captions)
    scores, unknown = _scores(config, memory_profiler)
    flops = _padded_flops(config, memory_profiler, stages, captions, batch_size)

    # 2. Find how many captions are decoded at a time.
    training = _training_moment(config, memory_profiler, stages, batch_size)
    captioning = plan_captions(config, device, memory_profiler, stages, captions, scores)

    # 3. Put the plan together.
    return Plan(
        **_config_fields(config, memory_profiler),
        device=device,
        training=scale_activations(training, device.activation_ratio),
        generation=captioning.moment,
        host=_host_peak(config, memory_profiler, stages, scores, batch_size, captioning.num_slots),
        batch_size=batch_size,
        flops=flops / batch_size,
        clip_s=_step_seconds(config, flops, stages, device) / batch_size,
        **_caption_fields(captioning),
        num_clips=num_clips or config.data.max_clips or NUM_CLIPS,
        cache_bytes=stored_bytes(config, memory_profiler),
        download_bytes=download_bytes(config),
        num_kept=num_kept,
        not_counted=unknown,
    )


def _caption_fields(captioning: CaptionPlan) -> dict[str, Any]:
    """Returns the fields of a plan that describe how captions are generated."""
    return {
        "eval_batch_size": captioning.num_slots,
        "caption_s": captioning.caption_s,
        "token_s": captioning.token_s,
        "token_bytes": captioning.token.moved_bytes,
        "token_launches": captioning.token.num_launches,
        "is_captured": captioning.token.is_captured,
        "is_merged": captioning.is_merged,
    }


def _check_plannable(config: Config) -> None:
    """Raises `NotPlannedError` for what cannot be profiled."""
    if config.tuning.use_lora and lora_of(config).use_dora and config.llm.quantization.name == "4bit":
        raise NotPlannedError(
            "tuning.lora.use_dora=true with llm.quantization=4bit cannot be planned, as DoRA unpacks weights, which a "
            "plan does not have; plan it without DoRA, and leave room for one layer's unpacked weights"
        )


def _config_fields(config: Config, memory_profiler: MemoryProfiler) -> dict[str, Any]:
    """Returns the fields of a plan that follow from its configuration."""
    return {
        "title": " + ".join(config.component_names.values()),
        "hardware": config.hardware.name,
        "is_cached": config.cache.enabled is True,
        "num_visual": memory_profiler.sizes.num_visual,
        "num_text": memory_profiler.sizes.num_prompt + config.llm.caption_tokens,
        "num_caption": max(config.llm.caption_tokens, config.llm.new_tokens),
        "is_caption_assumed": config.llm.is_length_open,
        "num_frames": config.data.num_frames,
    }


def fullest_batch(config: Config, memory_profiler: MemoryProfiler, captions: CaptionLengths) -> tuple[int, int]:
    """Returns the clips of the largest training batch, and the caption tokens that each of them is padded to.

    Under `data.max_tokens_per_batch` the batch holds as many of the shortest clips as possible, and captions fill the
    remaining tokens.
    """
    budget, longest = config.data.max_tokens_per_batch, config.llm.caption_tokens
    if budget is None:
        return config.data.batch_size, longest
    # The most clips fit if all captions are as short as the shortest.
    count = max(1, budget // (memory_profiler.sizes.num_before_caption + captions.tokens[0]))
    return count, min(longest, max(1, budget // count - memory_profiler.sizes.num_before_caption))


def _scores(config: Config, memory_profiler: MemoryProfiler) -> tuple[dict[str, ProfiledStage], list[str]]:
    """Returns the models of scores by name, and the settings whose models are not known on this machine."""
    profiles = memory_profiler.scores()
    stages = {key.partition("_")[0]: ProfiledStage(key, stage) for key, stage in profiles.items() if stage is not None}
    return stages, [f"evaluation.{key}" for key, stage in profiles.items() if stage is None]


def _training_moment(
    config: Config, memory_profiler: MemoryProfiler, stages: Sequence[ProfiledStage], batch_size: int
) -> Moment:
    name, size = clip_bytes(config, memory_profiler)
    accumulates = config.trainer.accumulate_grad_batches > 1
    held = {name: size * batch_size}
    return training_peak(
        stages, held, config.optim.kind.value, accumulates=accumulates, unused_share=unused_share(config)
    )


def _host_peak(
    config: Config,
    memory_profiler: MemoryProfiler,
    stages: Sequence[ProfiledStage],
    scores: Mapping[str, ProfiledStage],
    batch_size: int,
    num_slots: int,
) -> Moment:
    _, size = clip_bytes(config, memory_profiler)
    num_captioned = prompt_batch_size(num_slots, config.evaluation.clips_per_slot)
    clips = {"training": batch_size, "validation": num_captioned}
    feature_bytes = (
        0.0
        if config.cache.enabled is True
        else feature_values(memory_profiler) * dtype_of(config.hardware.precision).itemsize
    )
    block_bytes = (
        memory_profiler.checkpoint_bytes(batch_size, config.llm.caption_tokens)
        if config.hardware.offload_checkpoints
        else 0.0
    )
    offloaded = memory_profiler.depth * pinned_bytes(block_bytes)
    batches = [HostBatch(name, size * count) for name, count in clips.items()]
    return host_peak(config, stages, batches, offloaded, num_captioned * feature_bytes, scores)


def _padded_flops(
    config: Config,
    memory_profiler: MemoryProfiler,
    stages: Sequence[ProfiledStage],
    captions: CaptionLengths,
    batch_size: int,
) -> float:
    """Returns the arithmetic of a step on a batch of expected length; the profile is of one with the longest captions.

    A batch is padded to its longest clip, out of random ones or of clips of similar length. Arithmetic is scaled by
    tokens, which ignores that attention grows faster.
    """
    _, profiled = fullest_batch(config, memory_profiler, captions)
    # Sorted batches are padded little, so that the mean counts; a shuffled one is padded to its longest caption.
    length = captions.longest_of(batch_size) if config.data.batching is Batching.shuffled else captions.mean
    padded = length if config.data.max_tokens_per_batch is None else profiled
    before = memory_profiler.sizes.num_before_caption
    # The language model's arithmetic grows with its tokens.
    share = (before + min(padded, profiled)) / (before + profiled)
    *front, language = (stage.memory.flops for stage in stages)
    return sum(front) + share * language


def _step_seconds(config: Config, flops: float, stages: Sequence[ProfiledStage], device: DeviceInfo) -> float:
    packed, checkpointed = packed_bytes(config, stages[-1]), config.hardware.gradient_checkpointing
    return training_seconds(flops, packed, device, is_checkpointed=checkpointed)


def training_seconds(flops: float, packed_bytes: float, device: DeviceInfo, *, is_checkpointed: bool) -> float:
    """Returns the seconds of a training step.

    Args:
        flops: Floating-point operations of the step.
        packed_bytes: Bytes of 4-bit weights, half a byte each, which every pass unpacks.
        device: Device that the step runs on.
        is_checkpointed: Whether the forward pass runs twice.
    """
    # Weights are unpacked in the forward and the backward pass, and once more for a recomputation.
    passes = 3 if is_checkpointed else 2
    moved = passes * 2 * packed_bytes * UNPACKED_BYTES  # 2: weights per packed byte
    return flops / (device.utilisation * device.peak_flops) + moved / device.bytes_per_s


def num_kept_layers(config: Config) -> int:
    """Returns how many of the last language model layers are not recomputed; 0 without hardware.activation_budget_gib.

    Raises:
        UserError: The components do not fit together, or the architecture is not known.
    """
    if config.hardware.activation_budget_gib is None or not config.hardware.gradient_checkpointing:
        return 0
    from vlmcap.planning.estimate.memory_profiler import MemoryProfiler

    return kept_within(
        config, MemoryProfiler(config, device_info(config.hardware.name, config.hardware.memory_gib).has_flash)
    )


def kept_within(config: Config, memory_profiler: MemoryProfiler) -> int:
    """Returns `num_kept_layers` of a configuration that already has a memory profiler."""
    budget = config.hardware.activation_budget_gib
    if budget is None or not config.hardware.gradient_checkpointing:
        return 0
    accumulates = config.trainer.accumulate_grad_batches > 1
    captions = CaptionLengths.assumed(config.llm.caption_tokens)

    def needed(num_kept: int) -> float:
        stages = training_stages(config, memory_profiler, num_kept, captions)
        return activations(training_peak(stages, {}, config.optim.kind.value, accumulates=accumulates))

    most = memory_profiler.depth - memory_profiler.min_recomputed
    # From the most layers down, the first number that is within the budget.
    return next((kept for kept in range(most, 0, -1) if needed(kept) <= budget * GIB), 0)


def training_stages(
    config: Config, memory_profiler: MemoryProfiler, num_kept: int, captions: CaptionLengths
) -> list[ProfiledStage]:
    """Returns the stages of a training step, without the encoder where its features are stored."""
    num_clips, num_caption = fullest_batch(config, memory_profiler, captions)
    language = memory_profiler.language(num_clips, num_caption, num_kept)
    return [*stages_in_front(config, memory_profiler, num_clips), ProfiledStage("language model", language)]


def enforce_plan(config: Config) -> Plan | None:
    """Plans a run and reports where it does not fit; returns None where no plan is made.

    Raises:
        DoesNotFitError: The run does not fit, and plan.enforce=error.
    """
    if config.plan.enforce is Enforce.off or config.hardware.accelerator == "cpu":
        return None
    if config.trainer.strategy is Strategy.fsdp2:
        print(
            "No memory plan is made, as trainer=fsdp2 shards the model and a plan is for one GPU that holds all of it.",
            flush=True,
        )
        return None
    try:
        plan = make_plan(config)
    except NotPlannedError as error:
        print(f"No memory plan is made: {error}", flush=True)
        return None
    except UserError:
        raise
    except Exception as error:  # a model that cannot be profiled must not end a run
        print(f"No memory plan is made: {type(error).__name__}: {error}", flush=True)
        return None
    if not plan.fits:
        sentence = (
            f"{plan.title} needs {plan.peak_gib:.1f} GiB ({plan.training_gib:.1f} in training, "
            f"{plan.generation_gib:.1f} in generation) and hardware={plan.hardware} has {plan.device.usable_gib:.1f}; "
            "`vlmcap plan` with the same overrides shows what makes it fit, and plan.enforce=warn trains anyway"
        )
        _enforce(config, sentence, plan.peak_gib, plan.device.usable_gib)
    machine_gib = detect_cpu().total_gib
    if sentence := host_sentence(config, plan.host, machine_gib):
        _enforce(config, f"{sentence}, and plan.enforce=warn trains anyway", plan.host_gib, machine_gib)
    return plan


def _enforce(config: Config, sentence: str, needed_gib: float, usable_gib: float) -> None:
    """Raises for a run that cannot fit, or warns about it, depending on `plan.enforce`."""
    if config.plan.enforce is Enforce.error:
        raise DoesNotFitError(sentence, needed_gib, usable_gib)
    print(f"Warning: {sentence}", flush=True)


def with_caption_plan(config: Config) -> Config:
    """Fills in how captions are decoded, where the configuration leaves it to the plan.

    Without a plan, `MAX_SLOTS` captions are decoded at a time on a CPU, and on a GPU as many as a training batch has.

    Args:
        config: Run configuration.
    """
    num_slots, is_merged = config.data.eval_batch_size, config.evaluation.merge_adapters is True
    if num_slots is None or len(ways_to_merge(config)) > 1:
        num_planned, is_merged = _planned_captions(config)
        num_slots = num_slots or num_planned
    merge_adapters = is_merged or config.evaluation.merge_adapters
    evaluation = dataclasses.replace(config.evaluation, merge_adapters=merge_adapters)
    return dataclasses.replace(
        config, data=dataclasses.replace(config.data, eval_batch_size=num_slots), evaluation=evaluation
    )


def _planned_captions(config: Config) -> tuple[int, bool]:
    """Returns how many captions are decoded at a time, and whether adapters are merged meanwhile."""
    is_merged = config.evaluation.merge_adapters is True
    if config.hardware.accelerator == "cpu" or config.evaluation.engine is Engine.vllm:
        return MAX_SLOTS, is_merged
    few = config.data.batch_size
    if config.trainer.strategy is Strategy.fsdp2:
        return few, is_merged
    try:
        plan = make_plan(config)
    except Exception as error:  # what cannot be planned can still be captioned
        print(
            f"Captions are written {few} at a time, as their memory cannot be planned ({error}); "
            "set data.eval_batch_size to change it.",
            flush=True,
        )
        return few, is_merged
    return plan.eval_batch_size, plan.is_merged
