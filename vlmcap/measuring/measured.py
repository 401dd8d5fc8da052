"""A plan beside what a card did."""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from typing import Any

from vlmcap.measuring.memory_use import Use
from vlmcap.planning.calibration import Calibration
from vlmcap.planning.cards import GIB
from vlmcap.planning.memory import Moment, is_known
from vlmcap.planning.plan import Plan

# Planned weights, and bytes beyond them: below, what is measured is the cost of calling kernels and the noise of the allocator.
_LEAST_WEIGHTS_GIB, _LEAST_GIB = 0.5, 0.1


@dataclass(frozen=True, slots=True)
class Measured:
    """Three training steps and a short generation.

    Attributes:
        training: Memory of the steps.
        generation: Memory while captions were written.
        context_gib: On the card beside PyTorch's allocator.
        clip_s: Seconds a clip of a step.
        token_s: Seconds of a caption token of every clip of an evaluation batch.
        num_new: Tokens of the short captions.
    """

    training: Use
    generation: Use
    context_gib: float
    clip_s: float
    token_s: float
    num_new: int


@dataclass(frozen=True, slots=True)
class Comparison:
    """A plan and its measurement.

    Attributes:
        plan: Without calibration, for captions as short as the measured ones.
        measured: What the card did.
        card: As PyTorch names it.
        memory_gib: Of it.
        num_blocks: That encoder and language model were cut to; None if they were whole.
        why_not_kept: Why it says nothing of later plans; empty if it does.
    """

    plan: Plan
    measured: Measured
    card: str
    memory_gib: float
    num_blocks: int | None
    why_not_kept: str = ""

    @property
    def training_gib(self) -> float:
        """What the card held at most in training: the allocator's memory and the context."""
        return self.measured.training.reserved + self.measured.context_gib

    @property
    def generation_gib(self) -> float:
        """The same of generation."""
        return self.measured.generation.reserved + self.measured.context_gib

    @property
    def ratios(self) -> dict[str, float]:
        """Measured over planned: of memory and seconds."""
        plan, measured = self.plan, self.measured
        return {
            "training_gib": self.training_gib / plan.training_gib,
            "generation_gib": self.generation_gib / plan.generation_gib,
            "seconds_per_clip": measured.clip_s / plan.clip_s,
            "seconds_per_token": measured.token_s / plan.token_s,
        }

    def calibration(self) -> Calibration:
        """What later plans of this card take from it.

        Raises:
            ValueError: The measurement is too far from the plan to make a sound figure.
        """
        plan, measured = self.plan, self.measured
        beyond, known = _beyond_gib(plan.training), plan.training.total / GIB - _beyond_gib(plan.training)
        arithmetic_s = plan.flops / (plan.card.utilisation * plan.card.peak_flops)
        # Moving packed weights keeps its planned seconds; a tenth of the measured ones at least are arithmetic.
        measured_s = max(measured.clip_s - (plan.clip_s - arithmetic_s), 0.1 * measured.clip_s)
        return Calibration(
            card=self.card,
            memory_gib=round(self.memory_gib, 2),
            hardware=plan.hardware,
            date=datetime.date.today().isoformat(),
            model=plan.title,
            beyond_ratio=(measured.training.reserved - known) / beyond,
            context_gib=max(0.0, measured.context_gib),
            utilisation=plan.card.utilisation * arithmetic_s / measured_s,
            bandwidth_share=plan.card.bandwidth_share * plan.token_s / measured.token_s,
            tokens_per_s=self.tokens_per_s,
        )

    @property
    def tokens_per_s(self) -> float:
        """Caption tokens a second, over all clips of an evaluation batch."""
        return self.plan.eval_batch_size / self.measured.token_s

    def plain(self) -> dict[str, Any]:
        """As `--json` prints it; GiB and seconds as the names say."""
        plan, measured, ratios = self.plan, self.measured, self.ratios
        phases = {"training": (plan.training_gib, measured.training, self.training_gib)}
        phases["generation"] = (plan.generation_gib, measured.generation, self.generation_gib)
        memory = {
            phase: {
                "planned_gib": round(planned, 3),
                "measured_gib": round(total, 3),
                "allocated_gib": round(use.allocated, 3),
                "reserved_gib": round(use.reserved, 3),
                "ratio": round(ratios[f"{phase}_gib"], 3),
            }
            for phase, (planned, use, total) in phases.items()
        }
        seconds = {"seconds_per_clip": (plan.clip_s, measured.clip_s), "seconds_per_token": (plan.token_s, measured.token_s)}
        return {
            "model": plan.title,
            "hardware": plan.hardware,
            "card": self.card,
            "blocks": self.num_blocks,
            "batch_size": plan.batch_size,
            "eval_batch_size": plan.eval_batch_size,
            **memory,
            "context_gib": {"planned": plan.card.context_gib, "measured": round(measured.context_gib, 3)},
            **{
                name: {"planned": round(planned, 5), "measured": round(found, 5), "ratio": round(ratios[name], 3)}
                for name, (planned, found) in seconds.items()
            },
            "tokens_per_s": round(self.tokens_per_s, 2),
            "caption_tokens": measured.num_new,
            "kept": not self.why_not_kept,
            "why_not_kept": self.why_not_kept or None,
        }


def _beyond_gib(moment: Moment) -> float:
    return sum(size for name, size in moment.parts.items() if not is_known(name)) / GIB


def is_too_small(plan: Plan) -> bool:
    """Whether a plan has too little to say anything of others."""
    return plan.weights_gib < _LEAST_WEIGHTS_GIB or _beyond_gib(plan.training) < _LEAST_GIB
