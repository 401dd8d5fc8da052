"""What would make a run smaller whose memory did not do, by its plan."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from vlmcap.compose import from_plain, to_config, to_plain
from vlmcap.config import Config

_GROUPS = {"optim": "optim.kind"}  # a whole group that a change names, and what of it a configuration without groups has
_SHRINK = 0.8  # of what was planned, or of what the card has: where memory did run out, the plan was too low
_PLAIN = "lower data.batch_size and raise trainer.accumulate_grad_batches by as much, or set hardware.gradient_checkpointing=true"


def advice(config: Config) -> str:
    """The cheapest changes by the plan, as a part of a sentence; general ones where there is no plan."""
    shrink = "" if config.trainer.shrink_on_oom else "; trainer.shrink_on_oom=true finds a smaller micro-batch by itself"
    try:
        changes = planned_changes(config)
    except Exception:  # whatever a plan stumbles over, the user's trouble is the memory
        changes = []
    if not changes:
        return _PLAIN + shrink
    return "by the plan, cheapest first, " + ", then ".join(changes) + shrink


def planned_changes(config: Config) -> list[str]:
    """Overrides that bring the plan well under what did not do, each with its cost and the memory then."""
    from vlmcap.planning.make import make_plan, with_changes

    plain = to_plain(config)

    def changed(overrides: Sequence[str]) -> Config:
        pairs = (override.split("=", 1) for override in overrides)
        return to_config(from_plain(plain, {_GROUPS.get(key, key): value for key, value in pairs}))

    plan = make_plan(config)
    card = dataclasses.replace(plan.card, usable_gib=_SHRINK * min(plan.peak_gib, plan.card.usable_gib))
    plan = with_changes(dataclasses.replace(plan, card=card), [], card, changed)
    return [f"{' '.join(change.overrides)} ({change.cost}; {change.peak_gib:.1f} GiB)" for change in plan.changes]
