"""The plan of a configuration: its peak memory, its time and its disk space, from its architecture alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from vlmcap.assembly.parts import lora_of
from vlmcap.config import Config, Enforce, Engine, Strategy
from vlmcap.errors import DoesNotFit, NotPlannedError, UserError
from vlmcap.planning.calibration import calibrated_card
from vlmcap.planning.captioning import (
    MOST_ROWS,
    UNPACKED_BYTES,
    cached_bytes,
    clip_bytes,
    packed_bytes,
    plan_captions,
    stages_in_front,
    ways_to_merge,
)
from vlmcap.planning.hardware import GIB, Card, card_of
from vlmcap.planning.memory import Stage, activations, scale_beyond, training_peak
from vlmcap.planning.plan import Plan

if TYPE_CHECKING:
    from vlmcap.planning.estimate.tracer import Tracer

NUM_CLIPS = 8000  # training clips of AI Hub's Korean background video, about, where the data is not there and data.max_clips is not set


def make_plan(config: Config, card: Card | None = None, tracer: Tracer | None = None, *, num_clips: int | None = None) -> Plan:
    """The plan of a configuration for its GPU.

    Args:
        config: Run configuration.
        card: GPU to plan for; None takes that of the hardware profile, with the figures that were measured on it.
        tracer: Tracer of the same configuration, in place of an exact one.
        num_clips: Training clips, where they were counted; None takes data.max_clips, or as many as AI Hub's data set has.

    Raises:
        UserError: The parts do not fit together, or an architecture is not known.
        NotPlannedError: The memory of this combination cannot be predicted.
    """
    if config.tuning.use_lora and lora_of(config).use_dora and config.llm.quantization.name == "4bit":
        raise NotPlannedError(
            "tuning.lora.use_dora=true over llm.quantization=4bit cannot be planned, as DoRA unpacks the weights and a plan has none; "
            "plan it without DoRA, and leave room for one layer's weights in full"
        )
    from vlmcap.planning.estimate.sizes import download_bytes
    from vlmcap.planning.estimate.tracer import Tracer  # loads bitsandbytes, which a run without a plan may do without

    # 1. Trace the stages of a training step, and find its fullest moment.
    card = card or calibrated_card(config)
    tracer = tracer or Tracer(config, card.has_flash)
    num_kept = kept_within(config, tracer)
    steps = training_stages(config, tracer, num_kept)
    name, size = clip_bytes(config, tracer)
    accumulates = config.trainer.accumulate_grad_batches > 1
    training = training_peak(steps, {name: size * config.data.batch_size}, config.optim.kind.value, accumulates=accumulates)

    # 2. Find how many captions are written at a time, and what they take.
    captions = plan_captions(config, card, tracer, steps)
    return Plan(
        title=" + ".join(config.part_names.values()),
        hardware=config.hardware.name,
        card=card,
        training=scale_beyond(training, card.beyond_ratio),
        generation=captions.moment,
        num_visual=tracer.sizes.num_visual,
        num_text=tracer.sizes.num_prompt + config.llm.caption_tokens,
        num_caption=max(config.llm.caption_tokens, config.llm.new_tokens),
        is_caption_assumed=config.llm.is_length_open,
        batch_size=config.data.batch_size,
        eval_batch_size=captions.num_rows,
        num_frames=config.data.num_frames,
        flops=sum(stage.trace.flops for stage in steps) / config.data.batch_size,
        clip_s=_clip_seconds(config, steps, card),
        caption_s=captions.caption_s,
        token_s=captions.token_s,
        token_bytes=captions.token.moved_bytes,
        token_launches=captions.token.num_launches,
        is_captured=captions.token.is_captured,
        is_merged=captions.is_merged,
        num_clips=num_clips or config.data.max_clips or NUM_CLIPS,
        cache_bytes=cached_bytes(tracer),
        download_bytes=download_bytes(config),
        is_cached=config.cache.enabled is True,
        num_kept=num_kept,
    )


def _clip_seconds(config: Config, steps: Sequence[Stage], card: Card) -> float:
    flops, packed = sum(stage.trace.flops for stage in steps), packed_bytes(config, steps[-1])
    checkpointed = config.hardware.gradient_checkpointing
    return training_seconds(flops, packed, card, is_checkpointed=checkpointed) / config.data.batch_size


def training_seconds(flops: float, packed_bytes: float, card: Card, *, is_checkpointed: bool) -> float:
    """Seconds of a step.

    Args:
        flops: Of the step.
        packed_bytes: Of 4-bit weights, half a byte each, which every pass unpacks.
        card: That it runs on.
        is_checkpointed: The forward pass runs twice.
    """
    passes = 3 if is_checkpointed else 2
    moved = passes * 2 * packed_bytes * UNPACKED_BYTES
    return flops / (card.utilisation * card.peak_flops) + moved / card.bytes_per_s


def num_kept_layers(config: Config) -> int:
    """Last layers of the language model that are not computed again; 0 where there is no budget.

    Raises:
        UserError: The parts do not fit together, or the architecture is not known.
    """
    if config.hardware.activation_budget_gib is None or not config.hardware.gradient_checkpointing:
        return 0
    from vlmcap.planning.estimate.tracer import Tracer

    return kept_within(config, Tracer(config, card_of(config.hardware.name, config.hardware.memory_gib).has_flash))


def kept_within(config: Config, tracer: Tracer) -> int:
    """The number of kept layers of a configuration whose tracer is at hand; see `num_kept_layers`."""
    budget = config.hardware.activation_budget_gib
    if budget is None or not config.hardware.gradient_checkpointing:
        return 0
    accumulates = config.trainer.accumulate_grad_batches > 1

    def needed(num_kept: int) -> float:
        stages = training_stages(config, tracer, num_kept)
        return activations(training_peak(stages, {}, config.optim.kind.value, accumulates=accumulates))

    most = tracer.depth - tracer.fewest_again
    return next((kept for kept in range(most, 0, -1) if needed(kept) <= budget * GIB), 0)


def training_stages(config: Config, tracer: Tracer, num_kept: int) -> list[Stage]:
    """The stages of a training step, the encoder left out where its features are stored."""
    language = tracer.language(config.data.batch_size, config.llm.caption_tokens, num_kept)
    return [*stages_in_front(config, tracer, config.data.batch_size), Stage("language model", language)]


def enforce_plan(config: Config) -> None:
    """Nothing where the configuration fits its card.

    Raises:
        DoesNotFit: And `plan.enforce=error`.
    """
    if config.plan.enforce is Enforce.off or config.hardware.accelerator == "cpu":
        return
    if config.trainer.strategy is Strategy.fsdp2:
        print("No memory plan: a plan is made for a GPU that holds the whole model, and trainer=fsdp2 shards it.", flush=True)
        return
    try:
        plan = make_plan(config)
    except NotPlannedError as error:
        print(f"No memory plan: {error}", flush=True)
        return
    except UserError:
        raise
    except Exception as error:  # a model that cannot be traced is no reason to lose a run
        print(f"No memory plan: {type(error).__name__}: {error}", flush=True)
        return
    if plan.fits:
        return
    sentence = (
        f"{plan.title} needs {plan.peak_gib:.1f} GiB ({plan.training_gib:.1f} in training, {plan.generation_gib:.1f} in generation) and "
        f"hardware={plan.hardware} has {plan.card.usable_gib:.1f}; `vlmcap plan` with the same overrides says what makes it fit, "
        "plan.enforce=warn trains all the same"
    )
    if config.plan.enforce is Enforce.error:
        raise DoesNotFit(sentence, plan.peak_gib, plan.card.usable_gib)
    print(f"Warning: {sentence}", flush=True)


def with_caption_plan(config: Config) -> Config:
    """The configuration with numbers where it leaves to the plan how captions are written.

    Where nothing can be planned, as on a CPU, as many are written at a time as anywhere, or as many as a training batch has on a GPU.

    Args:
        config: Run configuration.
    """
    rows, is_merged = config.data.eval_batch_size, config.evaluation.merge_adapters is True
    if rows is None or len(ways_to_merge(config)) > 1:
        num_planned, is_merged = _planned_captions(config)
        rows = rows or num_planned
    merge_adapters = is_merged or config.evaluation.merge_adapters
    evaluation = dataclasses.replace(config.evaluation, merge_adapters=merge_adapters)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, eval_batch_size=rows), evaluation=evaluation)


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
        print(f"Captions are written {few} at a time, as they cannot be planned: {error}; set data.eval_batch_size", flush=True)
        return few, is_merged
    return plan.eval_batch_size, plan.is_merged
