"""Changes that make a configuration smaller, in order of lost quality, for a plan that does not fit or an OOM."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from vlmcap.compose import compose, to_plain
from vlmcap.config import Config
from vlmcap.config.unread import unread_keys
from vlmcap.config_saved import saved_config
from vlmcap.errors import UserError
from vlmcap.planning.hardware import DeviceInfo
from vlmcap.planning.make_plan import make_plan
from vlmcap.planning.plan import Change, Plan

# Override and what it costs, in order of lost quality.
_CHANGES: tuple[tuple[str, str], ...] = (
    ("hardware.gradient_checkpointing=true", "a third more compute"),
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
_GROUP_KEYS = {"optim": "optim.kind"}  # group of a change to its key in a saved configuration, which has no groups
_SHRINK = 0.8  # share of the plan, or of the GPU's memory, to aim at: where memory ran out, the plan was too low
_GENERAL_ADVICE = (
    "lower data.batch_size and raise trainer.accumulate_grad_batches by the same factor, "
    "or set hardware.gradient_checkpointing=true"
)


def with_changes(
    plan: Plan,
    overrides: Sequence[str],
    device: DeviceInfo | None = None,
    compose_config: Callable[[Sequence[str]], Config] = compose,
) -> Plan:
    """Adds the cheapest changes that make a plan fit, or come closest; a plan that fits is unchanged.

    Args:
        plan: Plan of the overrides.
        overrides: Overrides of the configuration, as `train.py` takes them.
        device: Device as in `make_plan`.
        compose_config: Makes a configuration from overrides.
    """
    chosen: list[Change] = []
    best, taken = plan, list(overrides)
    for override, cost in _CHANGES:
        if best.fits:
            break
        try:
            config = compose_config([*taken, override])
            changed = make_plan(config, device)
        except UserError:  # the change is not possible with these components
            continue
        # GiB; a smaller gain is not worth its cost.
        if changed.peak_gib < best.peak_gib - 0.05:
            taken.append(override)
            chosen.append(Change((override,), cost, changed.peak_gib))
            best = changed
    return dataclasses.replace(
        plan, changes=_without_needless(chosen, overrides, device, compose_config) if best.fits else chosen
    )


def _without_needless(
    chosen: Sequence[Change],
    overrides: Sequence[str],
    device: DeviceInfo | None,
    compose_config: Callable[[Sequence[str]], Config],
) -> list[Change]:
    """Removes changes that are not needed for the plan to fit."""
    kept = list(chosen)
    # The last change made it fit, so it is needed.
    for change in reversed(chosen[:-1]):
        rest = [other for other in kept if other is not change]
        flat = [override for other in rest for override in other.overrides]
        if make_plan(compose_config([*overrides, *flat]), device).fits:
            kept = rest
    taken, result = list(overrides), []
    # Peaks are planned again, as each is that of the changes up to its own.
    for change in kept:
        taken += change.overrides
        result.append(dataclasses.replace(change, peak_gib=make_plan(compose_config(taken), device).peak_gib))
    return result


def advice(config: Config) -> str:
    """Returns the cheapest planned changes as part of a sentence, or general ones where there is no plan."""
    is_possible = "trainer.shrink_on_oom" not in unread_keys(config) and not config.trainer.shrink_on_oom
    shrink = "; trainer.shrink_on_oom=true finds a smaller micro-batch automatically" if is_possible else ""
    try:
        changes = planned_changes(config)
    except Exception:  # an error of the plan must not hide the out-of-memory error
        changes = []
    if not changes:
        return _GENERAL_ADVICE + shrink
    return "the plan suggests, cheapest first: " + ", then ".join(changes) + shrink


def planned_changes(config: Config) -> list[str]:
    """Returns overrides that bring the plan well below the memory that was not enough, with their costs and peaks."""
    plain = to_plain(config)

    def changed(overrides: Sequence[str]) -> Config:
        pairs = (override.split("=", 1) for override in overrides)
        return saved_config(plain, {_GROUP_KEYS.get(key, key): value for key, value in pairs}, is_training=True)

    plan = make_plan(config)
    # The run needed more than its plan said, so the aim is below both.
    device = dataclasses.replace(plan.device, usable_gib=_SHRINK * min(plan.peak_gib, plan.device.usable_gib))
    plan = with_changes(dataclasses.replace(plan, device=device), [], device, changed)
    return [f"{' '.join(change.overrides)} ({change.cost}; {change.peak_gib:.1f} GiB)" for change in plan.changes]
