"""The plan of a configuration: its peak memory, its time and its disk space, from its architecture alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vlmcap.assembly.parts import lora_of
from vlmcap.config import Batching, Config, Enforce, Strategy
from vlmcap.errors import DoesNotFit, NotPlannedError, UserError
from vlmcap.libraries import has_expandable_segments
from vlmcap.planning.calibration import calibrated_card
from vlmcap.planning.caption_lengths import CaptionLengths
from vlmcap.planning.hardware import GIB, Card, card_of, present_processor
from vlmcap.planning.host import HostBatch, host_peak, host_sentence, pinned_bytes
from vlmcap.planning.memory import (
    EXPANDABLE_SHARE,
    FIXED_SHARE,
    Captioning,
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
    from vlmcap.planning.estimate.stages import StageTrace
    from vlmcap.planning.estimate.tracer import Tracer

NUM_CLIPS = 8000  # training clips of AI Hub's Korean background video, about, where the data is not there and data.max_clips is not set
UNPACKED_BYTES = 2.5  # moved for a 4-bit weight that a product unpacks: half a byte read, two written
READ_AGAIN = 2  # bytes: then the product reads it
# Rows up to which bitsandbytes 0.50 multiplies by packed weights without unpacking them: at least 16 for most layers of these sizes on
# each GPU here (`_gemm_4bit_use_custom_cuda`, bitsandbytes PR #1949).
FUSED_ROWS = 16


def make_plan(
    config: Config,
    card: Card | None = None,
    tracer: Tracer | None = None,
    *,
    captions: CaptionLengths | None = None,
    num_clips: int | None = None,
) -> Plan:
    """The plan of a configuration for its GPU.

    Args:
        config: Run configuration.
        card: GPU to plan for; None takes that of the hardware profile, with the figures that were measured on it.
        tracer: Tracer of the same configuration, in place of an exact one.
        captions: Lengths of the training captions, where they were counted; None assumes those of Korean captions.
        num_clips: Training clips, where they were counted; None takes data.max_clips, or as many as AI Hub's data set has.

    Raises:
        UserError: The parts do not fit together, or an architecture is not known.
        NotPlannedError: The memory of this combination cannot be predicted.
    """
    _check_plannable(config)
    from vlmcap.planning.estimate.sizes import download_bytes
    from vlmcap.planning.estimate.tracer import Tracer  # loads bitsandbytes, which a run without a plan may do without

    # 1. Trace the stages of a training step, and the language model's passes in evaluation.
    card = card or calibrated_card(config)
    tracer = tracer or Tracer(config, card.has_flash)
    captions = captions or CaptionLengths.assumed(config.llm.caption_tokens)
    num_kept = kept_within(config, tracer)
    batch_size, _ = fullest_batch(config, tracer, captions)
    steps = training_stages(config, tracer, num_kept, captions)
    work = _captioning(config, tracer, card)
    scores, unknown = _scores(config, tracer)

    # 2. Put them together: the fullest moments, and the seconds.
    training, generation = _peaks(config, tracer, steps, work, scores, batch_size)
    token = _token_work(config, work)
    token_s = token_seconds(token, card)
    flops = _padded_flops(config, tracer, steps, captions, batch_size)
    return Plan(
        **_stated(config, tracer),
        card=card,
        training=scale_beyond(training, card.beyond_ratio),
        generation=scale_beyond(generation, card.beyond_ratio),
        host=_host_peak(config, tracer, steps, scores, batch_size),
        batch_size=batch_size,
        flops=flops / batch_size,
        clip_s=_step_seconds(config, flops, steps, card) / batch_size,
        caption_s=_caption_seconds(config, work.prefill.flops, token_s, captions, card),
        token_s=token_s,
        token_bytes=token.moved_bytes,
        token_launches=token.num_launches,
        num_clips=num_clips or config.data.max_clips or NUM_CLIPS,
        cache_bytes=_cached_bytes(tracer),
        download_bytes=download_bytes(config),
        num_kept=num_kept,
        not_counted=unknown,
    )


def _check_plannable(config: Config) -> None:
    """`NotPlannedError` for what cannot be traced."""
    if config.tuning.use_lora and lora_of(config).use_dora and config.llm.quantization.name == "4bit":
        raise NotPlannedError(
            "tuning.lora.use_dora=true over llm.quantization=4bit cannot be planned, as DoRA unpacks the weights and a plan has none; "
            "plan it without DoRA, and leave room for one layer's weights in full"
        )


def _stated(config: Config, tracer: Tracer) -> dict[str, Any]:
    """What a plan says of its configuration."""
    return {
        "title": " + ".join(config.part_names.values()),
        "hardware": config.hardware.name,
        "is_cached": config.cache.enabled is True,
        "num_visual": tracer.sizes.num_visual,
        "num_text": tracer.sizes.num_prompt + config.llm.caption_tokens,
        "num_caption": max(config.llm.caption_tokens, config.llm.new_tokens),
        "is_caption_assumed": config.llm.is_length_open,
        "eval_batch_size": config.data.eval_batch_size,
        "num_frames": config.data.num_frames,
    }


def fullest_batch(config: Config, tracer: Tracer, captions: CaptionLengths) -> tuple[int, int]:
    """Clips of a training batch, and caption tokens that each of them is padded to.

    Under `data.max_tokens_per_batch` it holds as many of the shortest clips as there may be, and captions fill what is left.
    """
    budget, longest = config.data.max_tokens_per_batch, config.llm.caption_tokens
    if budget is None:
        return config.data.batch_size, longest
    count = max(1, budget // (_prompt_tokens(tracer) + captions.tokens[0]))
    return count, min(longest, max(1, budget // count - _prompt_tokens(tracer)))


def _captioning(config: Config, tracer: Tracer, card: Card) -> Captioning:
    """The language model's part of an evaluation batch."""
    from vlmcap.planning.estimate.sizes import grouped_queries, key_value_bytes

    num_clips, rows = config.data.eval_batch_size, config.data.eval_batch_size * config.evaluation.num_beams
    # A block's cache grows by a larger one beside it. Keys and values are repeated for all queries of a token before compute capability
    # 8.0, and where guesses make it several tokens.
    is_repeated = not card.has_flash or config.evaluation.speculate_ngram > 0
    return Captioning(
        prefill=tracer.language(rows, 0),
        validation=tracer.language(num_clips, config.llm.caption_tokens, is_training=False),
        token_bytes=key_value_bytes(config) * rows,
        prompt_tokens=_prompt_tokens(tracer),
        new_tokens=config.llm.new_tokens,
        copied_share=(grouped_queries(config) if is_repeated else 1.0) / tracer.depth,
    )


def _scores(config: Config, tracer: Tracer) -> tuple[dict[str, Stage], list[str]]:
    """Models of scores by their names, and the settings of those that are not known here."""
    traced = tracer.scores()
    stages = {key.partition("_")[0]: Stage(key, trace) for key, trace in traced.items() if trace is not None}
    return stages, [f"evaluation.{key}" for key, trace in traced.items() if trace is None]


def _peaks(
    config: Config, tracer: Tracer, steps: Sequence[Stage], work: Captioning, scores: Mapping[str, Stage], batch_size: int
) -> tuple[Moment, Moment]:
    """The fullest moments of a training step and of evaluation."""
    data, optimizer = config.data, config.optim.kind.value
    unused = 0.0
    if config.hardware.accelerator != "cpu":
        unused = EXPANDABLE_SHARE if has_expandable_segments() else FIXED_SHARE
    name, size = _clip_input(config, tracer)
    accumulates = config.trainer.accumulate_grad_batches > 1
    training = training_peak(steps, {name: size * batch_size}, optimizer, accumulates=accumulates, unused_share=unused)
    waiting = data.eval_batch_size * config.evaluation.clips_per_row  # clips that are captioned later wait on the GPU
    generation = generation_peak(
        [*stages_in_front(config, tracer, data.eval_batch_size), steps[-1]],
        {name: size * waiting} | kept_between_steps(steps, optimizer),
        work,
        scores,
        unused_share=unused,
    )
    return training, generation


def _clip_input(config: Config, tracer: Tracer) -> tuple[str, float]:
    """What a clip brings with it, and its bytes."""
    is_cached = config.cache.enabled is True
    return ("stored features", _cached_bytes(tracer)) if is_cached else ("frames", float(tracer.sizes.frame_bytes))


def _host_peak(config: Config, tracer: Tracer, steps: Sequence[Stage], scores: Mapping[str, Stage], batch_size: int) -> Moment:
    """The fullest moment of the host."""
    _, size = _clip_input(config, tracer)
    data = config.data
    num_captioned = data.eval_batch_size * config.evaluation.clips_per_row
    clips = {"training": batch_size, "validation": num_captioned}
    feature_bytes = 0.0 if config.cache.enabled is True else _feature_values(tracer) * dtype_of(config.hardware.precision).itemsize
    block_bytes = tracer.checkpoint_bytes(batch_size, config.llm.caption_tokens) if config.hardware.offload_checkpoints else 0.0
    offloaded = tracer.depth * pinned_bytes(block_bytes)
    batches = [HostBatch(name, size * count) for name, count in clips.items()]
    return host_peak(config, steps, batches, offloaded, num_captioned * feature_bytes, scores)


def _prompt_tokens(tracer: Tracer) -> int:
    """Visual and text tokens in front of a caption."""
    return tracer.sizes.num_visual + tracer.sizes.num_prompt


def _feature_values(tracer: Tracer) -> float:
    """Numbers in the features of a clip."""
    frames, rows, columns = tracer.sizes.grid
    return float(frames * rows * columns * tracer.sizes.embed_dim)


def _cached_bytes(tracer: Tracer) -> float:
    size = {"float32": 4.0, "int8": 1.0}.get(tracer.config.cache.dtype, 2.0)
    return size * _feature_values(tracer) / (tracer.config.pool_size or 1) ** 2


def _packed_bytes(config: Config, trace: StageTrace) -> float:
    return trace.weights.get("quantisation state", 0.0) * 32 if config.llm.quantization.value == "4bit" else 0.0


def _padded_flops(config: Config, tracer: Tracer, steps: Sequence[Stage], captions: CaptionLengths, batch_size: int) -> float:
    """Arithmetic of a step on a batch as long as batches are, where the trace has one of the longest captions.

    A batch is padded to its longest clip: that of so many random ones, or of clips of like length. Arithmetic counts by tokens, which
    leaves out that attention grows faster.
    """
    _, traced = fullest_batch(config, tracer, captions)
    length = captions.longest_of(batch_size) if config.data.batching is Batching.shuffled else captions.mean
    padded = length if config.data.max_tokens_per_batch is None else traced
    share = (_prompt_tokens(tracer) + min(padded, traced)) / (_prompt_tokens(tracer) + traced)
    *front, language = (stage.trace.flops for stage in steps)
    return sum(front) + share * language


def _step_seconds(config: Config, flops: float, steps: Sequence[Stage], card: Card) -> float:
    packed, checkpointed = _packed_bytes(config, steps[-1].trace), config.hardware.gradient_checkpointing
    return training_seconds(flops, packed, card, is_checkpointed=checkpointed)


def _caption_seconds(config: Config, prompt_flops: float, token_s: float, captions: CaptionLengths, card: Card) -> float:
    """Seconds to caption a clip of many.

    A row writes one caption after the other, and the last of its batch waits for the longest of those of the other rows.
    """
    from vlmcap.planning.estimate.sizes import writes_itself

    data, per_row = config.data, config.evaluation.clips_per_row if writes_itself(config) else 1
    num_tokens = (per_row - 1) * captions.mean + captions.longest_of(data.eval_batch_size)
    read_s = per_row * prompt_flops / (card.utilisation * card.peak_flops)
    return (read_s + num_tokens * token_s) / (per_row * data.eval_batch_size)


@dataclass(frozen=True, slots=True)
class TokenWork:
    """What one caption token of every clip of an evaluation batch takes.

    Attributes:
        moved_bytes: Through the GPU's memory.
        num_launches: Kernels.
    """

    moved_bytes: float
    num_launches: float


def _token_work(config: Config, work: Captioning) -> TokenWork:
    """The work of a token: all weights and the cache at a caption's middle once, and the kernels of the prompt's pass."""
    from vlmcap.planning.estimate.sizes import unpacked_experts

    # Experts are unpacked whatever the number of rows, other weights for many rows alone.
    share = unpacked_experts(config, config.data.eval_batch_size) or float(config.data.eval_batch_size > FUSED_ROWS)
    unpacking = 2 * share * _packed_bytes(config, work.prefill) * (UNPACKED_BYTES - 0.5 + READ_AGAIN)
    cache_bytes = work.token_bytes * (work.prompt_tokens + work.new_tokens / 2)
    return TokenWork(sum(work.prefill.weights.values()) + unpacking + cache_bytes, work.prefill.launches)


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

    captions = CaptionLengths.assumed(config.llm.caption_tokens)

    def needed(num_kept: int) -> float:
        stages = training_stages(config, tracer, num_kept, captions)
        return activations(training_peak(stages, {}, config.optim.kind.value, accumulates=accumulates))

    most = tracer.depth - tracer.fewest_again
    return next((kept for kept in range(most, 0, -1) if needed(kept) <= budget * GIB), 0)


def training_stages(config: Config, tracer: Tracer, num_kept: int, captions: CaptionLengths) -> list[Stage]:
    """The stages of a training step, the encoder left out where its features are stored."""
    num_clips, num_caption = fullest_batch(config, tracer, captions)
    language = tracer.language(num_clips, num_caption, num_kept)
    return [*stages_in_front(config, tracer, num_clips), Stage("language model", language)]


def stages_in_front(config: Config, tracer: Tracer, num_clips: int) -> list[Stage]:
    """What clips go through in front of the language model."""
    first = [] if config.cache.enabled is True else [Stage("encoder", tracer.encoder(num_clips))]
    return [*first, Stage("projector", tracer.projector(num_clips))]


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
    if not plan.fits:
        sentence = (
            f"{plan.title} needs {plan.peak_gib:.1f} GiB ({plan.training_gib:.1f} in training, {plan.generation_gib:.1f} in generation) "
            f"and hardware={plan.hardware} has {plan.card.usable_gib:.1f}; `vlmcap plan` with the same overrides says what makes it fit, "
            "plan.enforce=warn trains all the same"
        )
        _refuse(config, sentence, plan.peak_gib, plan.card.usable_gib)
    machine_gib = present_processor().total_gib
    if sentence := host_sentence(config, plan.host, machine_gib):
        _refuse(config, f"{sentence}, and plan.enforce=warn trains all the same", plan.host_gib, machine_gib)


def _refuse(config: Config, sentence: str, needed_gib: float, usable_gib: float) -> None:
    """Ends a run that cannot fit, or warns of it, as `plan.enforce` says."""
    if config.plan.enforce is Enforce.error:
        raise DoesNotFit(sentence, needed_gib, usable_gib)
    print(f"Warning: {sentence}", flush=True)
