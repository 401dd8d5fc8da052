"""The plan of a configuration: what it takes, whether it fits, and what would make it fit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from vlmcap.compose import compose
from vlmcap.config import Config, Enforce, Strategy
from vlmcap.errors import DoesNotFit, NotPlannedError, UserError
from vlmcap.planning.activation_budget import kept_within, stages_in_front, training_stages
from vlmcap.planning.cards import Card
from vlmcap.planning.plan import Change, Plan

if TYPE_CHECKING:
    from vlmcap.planning.estimate.traces import Tracer
    from vlmcap.planning.memory import Stage

NO_DATA = "data.root=unset"  # a plan needs no clips
NUM_CLIPS = 8000  # training clips of AI Hub's Korean background video, about; data.max_clips where it is set
# In order of lost quality: override, where it changes anything, and what it costs.
_CHANGES: tuple[tuple[str, str], ...] = (
    ("hardware.gradient_checkpointing=true", "a third more arithmetic"),
    ("data.eval_batch_size=1", "slower captions"),
    ("data.batch_size=1", "no quality: raise trainer.accumulate_grad_batches by the same factor"),
    ("optim=adamw_8bit", "rounded optimiser state"),
    ("cache.enabled=true", "disk for the features"),
    ("llm.quantization=4bit", "rounded frozen weights"),
    ("tuning.lora.rank=8", "smaller adapters"),
    ("projector.reducer=pool", "a quarter of the visual tokens, 2 × 2 averaged"),
    ("data.num_frames=4", "fewer frames"),
    ("data.num_frames=2", "fewer frames still"),
)


def make_plan(config: Config, card: Card | None = None, tracer: Tracer | None = None) -> Plan:
    """The plan of a configuration on its card, from its architecture alone.

    Args:
        config: Of the run.
        card: Instead of `planned_card`'s.
        tracer: Of the same configuration, where it is not to be traced in the ordinary way.

    Raises:
        UserError: The parts do not fit together, or an architecture is not known.
        NotPlannedError: Of what would run, the memory cannot be foretold.
    """
    if config.tuning.use_lora and config.tuning.lora.use_dora and config.llm.quantization.name == "4bit":
        raise NotPlannedError(
            "tuning.lora.use_dora=true over llm.quantization=4bit cannot be planned, as DoRA unpacks the weights and a plan has none; "
            "plan it without DoRA, and leave room for one layer's weights in full"
        )
    from vlmcap.planning.estimate.sizes import download_bytes, key_value_bytes
    from vlmcap.planning.estimate.traces import Tracer
    from vlmcap.planning.memory import Stage, generation_peak, kept_between_steps, scale_beyond, training_peak

    card = card or planned_card(config)
    tracer = tracer or Tracer(config, card.has_flash)
    sizes, data = tracer.sizes, config.data
    is_cached = config.cache.enabled is True
    held_a_clip = _held(tracer, is_cached)

    num_kept = kept_within(config, tracer)
    steps = training_stages(config, tracer, num_kept)
    accumulates = config.trainer.accumulate_grad_batches > 1
    held = {name: size * data.batch_size for name, size in held_a_clip.items()}
    training = training_peak(steps, held, config.optim.kind.value, accumulates=accumulates)
    prompt = Stage("language model", tracer.language(data.eval_batch_size, 0))
    prompt_tokens = sizes.num_visual + sizes.num_prompt
    cache_bytes = key_value_bytes(config) * data.eval_batch_size
    waiting = data.eval_batch_size * config.evaluation.clips_per_row  # clips whose turn comes are on the card too
    generation = generation_peak(
        [*stages_in_front(config, tracer, data.eval_batch_size), steps[-1]],
        {name: size * waiting for name, size in held_a_clip.items()} | kept_between_steps(steps, config.optim.kind.value),
        prompt.trace,
        cache_bytes=cache_bytes,
        prompt_tokens=prompt_tokens,
        new_tokens=config.llm.max_new_tokens,
        depth=tracer.depth,
    )
    flops = sum(stage.trace.flops for stage in steps) / data.batch_size
    caption_s, token_s = _caption_seconds(config, prompt, cache_bytes * (prompt_tokens + config.llm.max_new_tokens / 2), card)
    return Plan(
        title=" + ".join(config.part_names.values()),
        hardware=config.hardware.name,
        card=card,
        training=scale_beyond(training, card.beyond_ratio),
        generation=scale_beyond(generation, card.beyond_ratio),
        num_visual=sizes.num_visual,
        num_text=sizes.num_prompt + config.llm.max_caption_tokens,
        batch_size=data.batch_size,
        eval_batch_size=data.eval_batch_size,
        num_frames=data.num_frames,
        flops=flops,
        clip_s=_clip_seconds(config, steps, card),
        caption_s=caption_s,
        token_s=token_s,
        num_clips=data.max_clips or NUM_CLIPS,
        cache_bytes=_cached_bytes(tracer),
        download_bytes=download_bytes(config),
        is_cached=is_cached,
        num_kept=num_kept,
    )


def planned_card(config: Config) -> Card:
    """The card of the profile, or this computer, with what `vlmcap doctor --measure` kept of it."""
    from vlmcap.planning.device import calibrated_card

    return calibrated_card(config)


def _held(tracer: Tracer, is_cached: bool) -> dict[str, float]:
    return {"stored features": _cached_bytes(tracer)} if is_cached else {"frames": float(tracer.sizes.frame_bytes)}


def _cached_bytes(tracer: Tracer) -> float:
    frames, rows, columns = tracer.sizes.grid
    size = {"float32": 4.0, "int8": 1.0}.get(tracer.config.cache.dtype, 2.0)
    pooled = tracer.config.projector.pool_size**2 if tracer.config.cache.pooled else 1
    return size * frames * rows * columns * tracer.sizes.embed_dim / pooled


def _packed_bytes(config: Config, stage: Stage) -> float:
    return stage.trace.weights.get("quantisation state", 0.0) * 32 if config.llm.quantization.value == "4bit" else 0.0


def _clip_seconds(config: Config, steps: Sequence[Stage], card: Card) -> float:
    from vlmcap.planning.costs import training_seconds

    flops, packed = sum(stage.trace.flops for stage in steps), _packed_bytes(config, steps[-1])
    checkpointed = config.hardware.gradient_checkpointing
    return training_seconds(flops, packed, card, is_checkpointed=checkpointed) / config.data.batch_size


def _caption_seconds(config: Config, prompt: Stage, cache_bytes: float, card: Card) -> tuple[float, float]:
    from vlmcap.planning.costs import caption_seconds, token_seconds

    weight_bytes, packed = sum(prompt.trace.weights.values()), _packed_bytes(config, prompt)
    seconds = caption_seconds(prompt.trace.flops, weight_bytes, packed, cache_bytes, config.llm.max_new_tokens, card)
    return seconds / config.data.eval_batch_size, token_seconds(weight_bytes, packed, cache_bytes, card)


def with_changes(
    plan: Plan, overrides: Sequence[str], card: Card | None = None, composed: Callable[[Sequence[str]], Config] = compose
) -> Plan:
    """The plan with the cheapest changes that make it fit, or that come nearest; unchanged where it fits.

    Args:
        plan: Of the overrides.
        overrides: Of the configuration, as `train.py` takes them.
        card: As of `make_plan`.
        composed: Makes a configuration of overrides.
    """
    chosen: list[Change] = []
    best, taken = plan, list(overrides)
    for override, cost in _CHANGES:
        if best.fits:
            break
        try:
            config = composed([*taken, override])
            changed = make_plan(config, card)
        except UserError:  # the change does not go with these parts
            continue
        if changed.peak_gib < best.peak_gib - 0.05:
            taken.append(override)
            chosen.append(Change((override,), cost, changed.peak_gib))
            best = changed
    return dataclasses.replace(plan, changes=_needed(chosen, overrides, card, composed) if best.fits else chosen)


def _needed(
    chosen: Sequence[Change], overrides: Sequence[str], card: Card | None, composed: Callable[[Sequence[str]], Config]
) -> list[Change]:
    """The changes without those that it fits without."""
    kept = list(chosen)
    for change in reversed(chosen[:-1]):
        rest = [other for other in kept if other is not change]
        flat = [override for other in rest for override in other.overrides]
        if make_plan(composed([*overrides, *flat]), card).fits:
            kept = rest
    taken, result = list(overrides), []
    for change in kept:
        taken += change.overrides
        result.append(dataclasses.replace(change, peak_gib=make_plan(composed(taken), card).peak_gib))
    return result


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
