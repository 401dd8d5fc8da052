"""The plan of a configuration: its peak memory, its time and its disk space, from its architecture alone."""

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
    MOST_ROWS,
    UNPACKED_BYTES,
    cached_bytes,
    clip_bytes,
    feature_values,
    packed_bytes,
    plan_captions,
    stages_in_front,
    unused_share,
    ways_to_merge,
)
from vlmcap.planning.hardware import GIB, DeviceInfo, detect_cpu, device_info
from vlmcap.planning.host import HostBatch, host_peak, host_sentence, pinned_bytes
from vlmcap.planning.memory import Moment, Stage, activations, scale_beyond, training_peak
from vlmcap.planning.plan import Plan

if TYPE_CHECKING:
    from vlmcap.planning.estimate.memory_profiler import MemoryProfiler

NUM_CLIPS = 8000  # training clips of AI Hub's Korean background video, about, where the data is not there and data.max_clips is not set


def make_plan(
    config: Config,
    gpu: DeviceInfo | None = None,
    memory_profiler: MemoryProfiler | None = None,
    *,
    captions: CaptionLengths | None = None,
    num_clips: int | None = None,
) -> Plan:
    """The plan of a configuration for its GPU.

    Args:
        config: Run configuration.
        gpu: GPU to plan for; None takes that of the hardware profile, with the figures that were measured on it.
        memory_profiler: MemoryProfiler of the same configuration, in place of an exact one.
        captions: Lengths of the training captions, where they were counted; None assumes those of Korean captions.
        num_clips: Training clips, where they were counted; None takes data.max_clips, or as many as AI Hub's data set
            has.

    Raises:
        UserError: The parts do not fit together, or an architecture is not known.
        NotPlannedError: The memory of this combination cannot be predicted.
    """
    _check_plannable(config)
    from vlmcap.planning.estimate.memory_profiler import (
        MemoryProfiler,
    )  # loads bitsandbytes, which a run without a plan may do without
    from vlmcap.planning.estimate.sizes import download_bytes

    # 1. Trace the stages of a training step, and models of scores.
    gpu = gpu or calibrated_device(config)
    memory_profiler = memory_profiler or MemoryProfiler(config, gpu.has_flash)
    captions = captions or CaptionLengths.assumed(config.llm.caption_tokens)
    num_kept = kept_within(config, memory_profiler)
    batch_size, _ = fullest_batch(config, memory_profiler, captions)
    steps = training_stages(config, memory_profiler, num_kept, captions)
    scores, unknown = _scores(config, memory_profiler)
    flops = _padded_flops(config, memory_profiler, steps, captions, batch_size)

    # 2. Find how many captions are written at a time, and put all together.
    training = _training_moment(config, memory_profiler, steps, batch_size)
    written = plan_captions(config, gpu, memory_profiler, steps, captions, scores)
    return Plan(
        **_stated(config, memory_profiler),
        gpu=gpu,
        training=scale_beyond(training, gpu.beyond_ratio),
        generation=written.moment,
        host=_host_peak(config, memory_profiler, steps, scores, batch_size, written.num_slots),
        batch_size=batch_size,
        flops=flops / batch_size,
        clip_s=_step_seconds(config, flops, steps, gpu) / batch_size,
        eval_batch_size=written.num_slots,
        caption_s=written.caption_s,
        token_s=written.token_s,
        token_bytes=written.token.moved_bytes,
        token_launches=written.token.num_launches,
        is_captured=written.token.is_captured,
        is_merged=written.is_merged,
        num_clips=num_clips or config.data.max_clips or NUM_CLIPS,
        cache_bytes=cached_bytes(memory_profiler),
        download_bytes=download_bytes(config),
        num_kept=num_kept,
        not_counted=unknown,
    )


def _check_plannable(config: Config) -> None:
    """`NotPlannedError` for what cannot be traced."""
    if config.tuning.use_lora and lora_of(config).use_dora and config.llm.quantization.name == "4bit":
        raise NotPlannedError(
            "tuning.lora.use_dora=true over llm.quantization=4bit cannot be planned, as DoRA unpacks the weights and "
            "a plan has none; "
            "plan it without DoRA, and leave room for one layer's weights in full"
        )


def _stated(config: Config, memory_profiler: MemoryProfiler) -> dict[str, Any]:
    """What a plan says of its configuration."""
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
    """Clips of a training batch, and caption tokens that each of them is padded to.

    Under `data.max_tokens_per_batch` it holds as many of the shortest clips as there may be, and captions fill what is
    left.
    """
    budget, longest = config.data.max_tokens_per_batch, config.llm.caption_tokens
    if budget is None:
        return config.data.batch_size, longest
    count = max(1, budget // (memory_profiler.sizes.num_before_caption + captions.tokens[0]))
    return count, min(longest, max(1, budget // count - memory_profiler.sizes.num_before_caption))


def _scores(config: Config, memory_profiler: MemoryProfiler) -> tuple[dict[str, Stage], list[str]]:
    """Models of scores by their names, and the settings of those that are not known here."""
    traced = memory_profiler.scores()
    stages = {key.partition("_")[0]: Stage(key, trace) for key, trace in traced.items() if trace is not None}
    return stages, [f"evaluation.{key}" for key, trace in traced.items() if trace is None]


def _training_moment(
    config: Config, memory_profiler: MemoryProfiler, steps: Sequence[Stage], batch_size: int
) -> Moment:
    """The fullest moment of a training step."""
    name, size = clip_bytes(config, memory_profiler)
    accumulates = config.trainer.accumulate_grad_batches > 1
    held = {name: size * batch_size}
    return training_peak(
        steps, held, config.optim.kind.value, accumulates=accumulates, unused_share=unused_share(config)
    )


def _host_peak(
    config: Config,
    memory_profiler: MemoryProfiler,
    steps: Sequence[Stage],
    scores: Mapping[str, Stage],
    batch_size: int,
    num_slots: int,
) -> Moment:
    """The fullest moment of the host."""
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
    return host_peak(config, steps, batches, offloaded, num_captioned * feature_bytes, scores)


def _padded_flops(
    config: Config, memory_profiler: MemoryProfiler, steps: Sequence[Stage], captions: CaptionLengths, batch_size: int
) -> float:
    """Arithmetic of a step on a batch as long as batches are, where the trace has one of the longest captions.

    A batch is padded to its longest clip: that of so many random ones, or of clips of like length. Arithmetic counts by
    tokens, which leaves out that attention grows faster.
    """
    _, traced = fullest_batch(config, memory_profiler, captions)
    length = captions.longest_of(batch_size) if config.data.batching is Batching.shuffled else captions.mean
    padded = length if config.data.max_tokens_per_batch is None else traced
    share = (memory_profiler.sizes.num_before_caption + min(padded, traced)) / (
        memory_profiler.sizes.num_before_caption + traced
    )
    *front, language = (stage.trace.flops for stage in steps)
    return sum(front) + share * language


def _step_seconds(config: Config, flops: float, steps: Sequence[Stage], gpu: DeviceInfo) -> float:
    packed, checkpointed = packed_bytes(config, steps[-1]), config.hardware.gradient_checkpointing
    return training_seconds(flops, packed, gpu, is_checkpointed=checkpointed)


def training_seconds(flops: float, packed_bytes: float, gpu: DeviceInfo, *, is_checkpointed: bool) -> float:
    """Seconds of a step.

    Args:
        flops: Of the step.
        packed_bytes: Of 4-bit weights, half a byte each, which every pass unpacks.
        gpu: That it runs on.
        is_checkpointed: The forward pass runs twice.
    """
    passes = 3 if is_checkpointed else 2
    moved = passes * 2 * packed_bytes * UNPACKED_BYTES
    return flops / (gpu.utilisation * gpu.peak_flops) + moved / gpu.bytes_per_s


def num_kept_layers(config: Config) -> int:
    """Last layers of the language model that are not computed again; 0 where there is no budget.

    Raises:
        UserError: The parts do not fit together, or the architecture is not known.
    """
    if config.hardware.activation_budget_gib is None or not config.hardware.gradient_checkpointing:
        return 0
    from vlmcap.planning.estimate.memory_profiler import MemoryProfiler

    return kept_within(
        config, MemoryProfiler(config, device_info(config.hardware.name, config.hardware.memory_gib).has_flash)
    )


def kept_within(config: Config, memory_profiler: MemoryProfiler) -> int:
    """The number of kept layers of a configuration whose memory_profiler is at hand; see `num_kept_layers`."""
    budget = config.hardware.activation_budget_gib
    if budget is None or not config.hardware.gradient_checkpointing:
        return 0
    accumulates = config.trainer.accumulate_grad_batches > 1

    captions = CaptionLengths.assumed(config.llm.caption_tokens)

    def needed(num_kept: int) -> float:
        stages = training_stages(config, memory_profiler, num_kept, captions)
        return activations(training_peak(stages, {}, config.optim.kind.value, accumulates=accumulates))

    most = memory_profiler.depth - memory_profiler.fewest_again
    return next((kept for kept in range(most, 0, -1) if needed(kept) <= budget * GIB), 0)


def training_stages(
    config: Config, memory_profiler: MemoryProfiler, num_kept: int, captions: CaptionLengths
) -> list[Stage]:
    """The stages of a training step, the encoder left out where its features are stored."""
    num_clips, num_caption = fullest_batch(config, memory_profiler, captions)
    language = memory_profiler.language(num_clips, num_caption, num_kept)
    return [*stages_in_front(config, memory_profiler, num_clips), Stage("language model", language)]


def enforce_plan(config: Config) -> Plan | None:
    """The plan of a run, which says so where it does not fit; None where no plan is made.

    Raises:
        DoesNotFitError: And `plan.enforce=error`.
    """
    if config.plan.enforce is Enforce.off or config.hardware.accelerator == "cpu":
        return None
    if config.trainer.strategy is Strategy.fsdp2:
        print(
            "No memory plan: a plan is made for a GPU that holds the whole model, and trainer=fsdp2 shards it.",
            flush=True,
        )
        return None
    try:
        plan = make_plan(config)
    except NotPlannedError as error:
        print(f"No memory plan: {error}", flush=True)
        return None
    except UserError:
        raise
    except Exception as error:  # a model that cannot be traced is no reason to lose a run
        print(f"No memory plan: {type(error).__name__}: {error}", flush=True)
        return None
    if not plan.fits:
        sentence = (
            f"{plan.title} needs {plan.peak_gib:.1f} GiB ({plan.training_gib:.1f} in training, "
            f"{plan.generation_gib:.1f} in generation) "
            f"and hardware={plan.hardware} has {plan.gpu.usable_gib:.1f}; `vlmcap plan` with the same overrides says "
            "what makes it fit, "
            "plan.enforce=warn trains all the same"
        )
        _refuse(config, sentence, plan.peak_gib, plan.gpu.usable_gib)
    machine_gib = detect_cpu().total_gib
    if sentence := host_sentence(config, plan.host, machine_gib):
        _refuse(config, f"{sentence}, and plan.enforce=warn trains all the same", plan.host_gib, machine_gib)
    return plan


def _refuse(config: Config, sentence: str, needed_gib: float, usable_gib: float) -> None:
    """Ends a run that cannot fit, or warns of it, as `plan.enforce` says."""
    if config.plan.enforce is Enforce.error:
        raise DoesNotFitError(sentence, needed_gib, usable_gib)
    print(f"Warning: {sentence}", flush=True)


def with_caption_plan(config: Config) -> Config:
    """The configuration with numbers where it leaves to the plan how captions are written.

    Where nothing can be planned, as on a CPU, as many are written at a time as anywhere, or as many as a training batch
    has on a GPU.

    Args:
        config: Run configuration.
    """
    rows, is_merged = config.data.eval_batch_size, config.evaluation.merge_adapters is True
    if rows is None or len(ways_to_merge(config)) > 1:
        num_planned, is_merged = _planned_captions(config)
        rows = rows or num_planned
    merge_adapters = is_merged or config.evaluation.merge_adapters
    evaluation = dataclasses.replace(config.evaluation, merge_adapters=merge_adapters)
    return dataclasses.replace(
        config, data=dataclasses.replace(config.data, eval_batch_size=rows), evaluation=evaluation
    )


def _planned_captions(config: Config) -> tuple[int, bool]:
    """Captions that are written at a time, and whether adapters are merged meanwhile."""
    is_merged = config.evaluation.merge_adapters is True
    if config.hardware.accelerator == "cpu" or config.evaluation.engine is Engine.vllm:
        return MOST_ROWS, is_merged
    few = config.data.batch_size
    if config.trainer.strategy is Strategy.fsdp2:
        return few, is_merged
    try:
        plan = make_plan(config)
    except Exception as error:  # what cannot be planned can be captioned all the same
        print(
            f"Captions are written {few} at a time, as they cannot be planned: {error}; set data.eval_batch_size",
            flush=True,
        )
        return few, is_merged
    return plan.eval_batch_size, plan.is_merged
