"""The plan of a configuration: its peak memory, its time and its disk space, from its architecture alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vlmcap.assembly.parts import lora_of
from vlmcap.config import Config, Enforce, Strategy
from vlmcap.errors import DoesNotFit, NotPlannedError, UserError
from vlmcap.planning.calibration import calibrated_card
from vlmcap.planning.hardware import GIB, Card, card_of
from vlmcap.planning.memory import (
    Moment,
    Stage,
    activations,
    generation_peak,
    kept_between_steps,
    scale_beyond,
    training_peak,
)
from vlmcap.planning.plan import Plan

if TYPE_CHECKING:
    from vlmcap.planning.estimate.tracer import Tracer

NUM_CLIPS = 8000  # training clips of AI Hub's Korean background video, about, where the data is not there and data.max_clips is not set
UNPACKED_BYTES = 2.5  # moved for a 4-bit weight that a product unpacks: half a byte read, two written
READ_AGAIN = 2  # bytes: then the product reads it
# Rows up to which bitsandbytes 0.50 multiplies by packed weights without unpacking them: at least 16 for most layers of these sizes on
# each GPU here (`_gemm_4bit_use_custom_cuda`, bitsandbytes PR #1949).
FUSED_ROWS = 16
CAPTION_SHARE = 0.6  # of the longest caption: the mean one, as in the Korean data


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
    from vlmcap.planning.estimate.sizes import active_experts, download_bytes, key_value_bytes
    from vlmcap.planning.estimate.tracer import Tracer  # loads bitsandbytes, which a run without a plan may do without

    # 1. Trace the stages of a training step, and the language model's pass over prompts.
    card = card or calibrated_card(config)
    tracer = tracer or Tracer(config, card.has_flash)
    num_kept = kept_within(config, tracer)
    steps = training_stages(config, tracer, num_kept)
    prompt = Stage("language model", tracer.language(config.data.eval_batch_size, 0))
    cache_bytes = key_value_bytes(config) * config.data.eval_batch_size

    # 2. Put them together: the fullest moments, and the seconds.
    training, generation = _peaks(config, tracer, steps, prompt, cache_bytes)
    cache_in_the_middle = cache_bytes * (_prompt_tokens(tracer) + config.llm.new_tokens / 2)
    token = _token_work(config, prompt, cache_in_the_middle, *active_experts(config, config.data.eval_batch_size))
    token_s = token_seconds(token, card)
    return Plan(
        title=" + ".join(config.part_names.values()),
        hardware=config.hardware.name,
        card=card,
        training=scale_beyond(training, card.beyond_ratio),
        generation=scale_beyond(generation, card.beyond_ratio),
        num_visual=tracer.sizes.num_visual,
        num_text=tracer.sizes.num_prompt + config.llm.caption_tokens,
        num_caption=max(config.llm.caption_tokens, config.llm.new_tokens),
        is_caption_assumed=config.llm.is_length_open,
        batch_size=config.data.batch_size,
        eval_batch_size=config.data.eval_batch_size,
        num_frames=config.data.num_frames,
        flops=sum(stage.trace.flops for stage in steps) / config.data.batch_size,
        clip_s=_clip_seconds(config, steps, card),
        caption_s=caption_seconds(prompt.trace.flops, token_s, config.llm.new_tokens, card) / config.data.eval_batch_size,
        token_s=token_s,
        token_bytes=token.moved_bytes,
        token_launches=token.num_launches,
        num_clips=num_clips or config.data.max_clips or NUM_CLIPS,
        cache_bytes=_cached_bytes(tracer),
        download_bytes=download_bytes(config),
        is_cached=config.cache.enabled is True,
        num_kept=num_kept,
    )


def _peaks(config: Config, tracer: Tracer, steps: Sequence[Stage], prompt: Stage, cache_bytes: float) -> tuple[Moment, Moment]:
    """The fullest moments of a training step and of generation."""
    data, optimizer = config.data, config.optim.kind.value
    is_cached = config.cache.enabled is True
    name, size = ("stored features", _cached_bytes(tracer)) if is_cached else ("frames", float(tracer.sizes.frame_bytes))
    accumulates = config.trainer.accumulate_grad_batches > 1
    training = training_peak(steps, {name: size * data.batch_size}, optimizer, accumulates=accumulates)
    waiting = data.eval_batch_size * config.evaluation.clips_per_row  # clips that are captioned later wait on the GPU
    generation = generation_peak(
        [*stages_in_front(config, tracer, data.eval_batch_size), steps[-1]],
        {name: size * waiting} | kept_between_steps(steps, optimizer),
        prompt.trace,
        cache_bytes=cache_bytes,
        prompt_tokens=_prompt_tokens(tracer),
        new_tokens=config.llm.new_tokens,
        depth=tracer.depth,
    )
    return training, generation


def _prompt_tokens(tracer: Tracer) -> int:
    """Visual and text tokens in front of a caption."""
    return tracer.sizes.num_visual + tracer.sizes.num_prompt


def _cached_bytes(tracer: Tracer) -> float:
    frames, rows, columns = tracer.sizes.grid
    size = {"float32": 4.0, "int8": 1.0}.get(tracer.config.cache.dtype, 2.0)
    pooled = (tracer.config.pool_size or 1) ** 2
    return size * frames * rows * columns * tracer.sizes.embed_dim / pooled


def _packed_bytes(config: Config, stage: Stage) -> float:
    return stage.trace.weights.get("quantisation state", 0.0) * 32 if config.llm.quantization.value == "4bit" else 0.0


def _clip_seconds(config: Config, steps: Sequence[Stage], card: Card) -> float:
    flops, packed = sum(stage.trace.flops for stage in steps), _packed_bytes(config, steps[-1])
    checkpointed = config.hardware.gradient_checkpointing
    return training_seconds(flops, packed, card, is_checkpointed=checkpointed) / config.data.batch_size


@dataclass(frozen=True, slots=True)
class TokenWork:
    """What one caption token of every clip of an evaluation batch takes.

    Attributes:
        moved_bytes: Through the GPU's memory.
        num_launches: Kernels.
    """

    moved_bytes: float
    num_launches: float


def _token_work(config: Config, prompt: Stage, cache_bytes: float, num_active: float, num_experts: int) -> TokenWork:
    """The work of a token: all weights and the cache once, and the kernels of the prompt's pass, with as many experts as are chosen.

    Args:
        config: Run configuration.
        prompt: The pass over the prompts.
        cache_bytes: Keys and values at a caption's middle.
        num_active: Experts of a layer that the batch's tokens choose.
        num_experts: All experts of a layer; 0 without any.
    """
    from vlmcap.planning.estimate.fake_tensors import NUM_SHARES

    launches, packed = prompt.trace.launches, _packed_bytes(config, prompt)
    num_launches = launches.get("layers", 0.0)
    if num_experts:
        num_launches += launches.get("experts", 0.0) * num_active / min(NUM_SHARES, num_experts)
        packed *= num_active / num_experts  # the loop unpacks those that are chosen
    elif config.data.eval_batch_size <= FUSED_ROWS:
        packed = 0.0
    unpacking = 2 * packed * (UNPACKED_BYTES - 0.5 + READ_AGAIN)
    return TokenWork(sum(prompt.trace.weights.values()) + unpacking + cache_bytes, num_launches)


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


def caption_seconds(flops: float, token_s: float, max_tokens: int, card: Card) -> float:
    """Seconds to caption a batch: its prompt by arithmetic, then one token of every clip after the other.

    Args:
        flops: Of the prompt's pass.
        token_s: Seconds per token of the whole batch.
        max_tokens: The longest caption, which ends the batch.
        card: That it runs on.
    """
    return flops / (card.utilisation * card.peak_flops) + CAPTION_SHARE * max_tokens * token_s


def token_seconds(work: TokenWork, card: Card) -> float:
    """Seconds of one token of every clip of a batch: the GPU's, or those that the host needs to launch its kernels if they are more."""
    return max(work.moved_bytes / (card.bandwidth_share * card.bytes_per_s), work.num_launches * card.launch_s)


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


def stages_in_front(config: Config, tracer: Tracer, num_clips: int) -> list[Stage]:
    """What clips go through in front of the language model."""
    first = [] if config.cache.enabled is True else [Stage("encoder", tracer.encoder(num_clips))]
    return [*first, Stage("projector", tracer.projector(num_clips))]


def enforce_plan(config: Config) -> Plan | None:
    """The plan of a run, which says so where it does not fit; None where no plan is made.

    Raises:
        DoesNotFit: And `plan.enforce=error`.
    """
    if config.plan.enforce is Enforce.off or config.hardware.accelerator == "cpu":
        return None
    if config.trainer.strategy is Strategy.fsdp2:
        print("No memory plan: a plan is made for a GPU that holds the whole model, and trainer=fsdp2 shards it.", flush=True)
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
    if plan.fits:
        return plan
    sentence = (
        f"{plan.title} needs {plan.peak_gib:.1f} GiB ({plan.training_gib:.1f} in training, {plan.generation_gib:.1f} in generation) and "
        f"hardware={plan.hardware} has {plan.card.usable_gib:.1f}; `vlmcap plan` with the same overrides says what makes it fit, "
        "plan.enforce=warn trains all the same"
    )
    if config.plan.enforce is Enforce.error:
        raise DoesNotFit(sentence, plan.peak_gib, plan.card.usable_gib)
    print(f"Warning: {sentence}", flush=True)
    return plan
