"""Changes that make a configuration smaller, in order of lost quality.

For a plan that does not fit, and for a run out of memory.
"""

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
_GROUPS = {
    "optim": "optim.kind"
}  # a whole group that a change names, and what of it a configuration without groups has
_SHRINK = 0.8  # of what was planned, or of what the GPU has: where memory did run out, the plan was too low
_PLAIN = "lower data.batch_size and raise trainer.accumulate_grad_batches by as much, or set hardware.gradient_checkpointing=true"


def with_changes(
    plan: Plan,
    overrides: Sequence[str],
    gpu: DeviceInfo | None = None,
    composed: Callable[[Sequence[str]], Config] = compose,
) -> Plan:
    """The plan with the cheapest changes that make it fit, or that come nearest; unchanged where it fits.

    Args:
        plan: Of the overrides.
        overrides: Of the configuration, as `train.py` takes them.
        gpu: As of `make_plan`.
        composed: Makes a configuration of overrides.
    """
    chosen: list[Change] = []
    best, taken = plan, list(overrides)
    for override, cost in _CHANGES:
        if best.fits:
            break
        try:
            config = composed([*taken, override])
            changed = make_plan(config, gpu)
        except UserError:  # the change does not go with these parts
            continue
        if changed.peak_gib < best.peak_gib - 0.05:
            taken.append(override)
            chosen.append(Change((override,), cost, changed.peak_gib))
            best = changed
    return dataclasses.replace(plan, changes=_needed(chosen, overrides, gpu, composed) if best.fits else chosen)


def _needed(
    chosen: Sequence[Change],
    overrides: Sequence[str],
    gpu: DeviceInfo | None,
    composed: Callable[[Sequence[str]], Config],
) -> list[Change]:
    """The changes without those that it fits without."""
    kept = list(chosen)
    for change in reversed(chosen[:-1]):
        rest = [other for other in kept if other is not change]
        flat = [override for other in rest for override in other.overrides]
        if make_plan(composed([*overrides, *flat]), gpu).fits:
            kept = rest
    taken, result = list(overrides), []
    for change in kept:
        taken += change.overrides
        result.append(dataclasses.replace(change, peak_gib=make_plan(composed(taken), gpu).peak_gib))
    return result


def advice(config: Config) -> str:
    """The cheapest changes by the plan, as a part of a sentence; general ones where there is no plan."""
    is_possible = "trainer.shrink_on_oom" not in unread_keys(config) and not config.trainer.shrink_on_oom
    shrink = "; trainer.shrink_on_oom=true finds a smaller micro-batch by itself" if is_possible else ""
    try:
        changes = planned_changes(config)
    except Exception:  # whatever a plan stumbles over, the user's trouble is the memory
        changes = []
    if not changes:
        return _PLAIN + shrink
    return "by the plan, cheapest first, " + ", then ".join(changes) + shrink


def planned_changes(config: Config) -> list[str]:
    """Overrides that bring the plan well under what did not do, each with its cost and the memory then."""
    plain = to_plain(config)

    def changed(overrides: Sequence[str]) -> Config:
        pairs = (override.split("=", 1) for override in overrides)
        return saved_config(plain, {_GROUPS.get(key, key): value for key, value in pairs}, is_training=True)

    plan = make_plan(config)
    gpu = dataclasses.replace(plan.gpu, usable_gib=_SHRINK * min(plan.peak_gib, plan.gpu.usable_gib))
    plan = with_changes(dataclasses.replace(plan, gpu=gpu), [], gpu, changed)
    return [f"{' '.join(change.overrides)} ({change.cost}; {change.peak_gib:.1f} GiB)" for change in plan.changes]
