"""`sweep=halving`: successive halving (Jamieson and Talwalkar, https://arxiv.org/abs/1502.07943).

All combinations run with few clips and epochs, the better share goes on with more, until one is left that runs with all
of them. A round costs each combination so much more as fewer are left, so that all rounds cost about the same.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vlmcap.config import Config, DemoDataConfig, HalvingSweepConfig, Scaled, TwoStageConfig
from vlmcap.errors import UserError
from vlmcap.files import replacing
from vlmcap.sweeping.composing import Composer, Job
from vlmcap.sweeping.job import FINISHED
from vlmcap.sweeping.runner import Done, Runner

FILE = "halving.json"


@dataclass(frozen=True, slots=True)
class Round:
    """One round.

    Attributes:
        share: Of the last round's clips times epochs.
        jobs: Of the combinations still in it.
        ends: What became of them.
        kept: Of each, whether it goes on.
    """

    share: float
    jobs: Sequence[Job]
    ends: Sequence[Done]
    kept: Sequence[bool]


class Halving:
    """Runs the rounds.

    Args:
        sweep: How.
        composer: Makes jobs.
        runner: Runs them.
        objective: Its name, and `max` or `min`.
    """

    def __init__(
        self, sweep: HalvingSweepConfig, composer: Composer, runner: Runner, objective: tuple[str, str]
    ) -> None:
        self._sweep, self._composer, self._runner, self._objective = sweep, composer, runner, objective

    def check(self, candidates: Sequence[Job]) -> None:
        """Nothing where the rounds can be made.

        Raises:
            UserError: It is not known how many clips there are.
        """
        for job in candidates:
            if not job.refusal and self._sweep.scaled is not Scaled.epochs:
                num_clips(job.config)

    def run(self, candidates: Sequence[Job]) -> list[Round]:
        """All rounds; each is written into `halving.json` when it is over, and found again in its jobs' folders by a resumed sweep.

        Args:
            candidates: The combinations, as the last round runs them.
        """
        left = [job for job in candidates if not job.refusal]
        self._runner.run([job for job in candidates if job.refusal])
        sizes = round_sizes(len(left), self._sweep.keep)
        rounds: list[Round] = []
        for index, size in enumerate(sizes):
            share = self._sweep.keep ** (len(sizes) - 1 - index)
            print(
                f"Round {index + 1} of {len(sizes)}: {len(left)} combinations with {share:.0%} of the work of the "
                "last round",
                flush=True,
            )
            jobs = [
                self._composer.job(scaled(job, share, self._sweep.scaled), _named(job, index, len(sizes)))
                for job in left
            ]
            ends = self._runner.run(jobs)
            after = sizes[index + 1] if index + 1 < len(sizes) else size
            chosen = best(ends, after, self._objective[1])
            rounds.append(Round(share, jobs, ends, [number in chosen for number in range(len(ends))]))
            self._write(rounds)
            left = [left[number] for number in chosen]
            if not left:
                print("No combination of this round came to an end, so none can go on.", flush=True)
                break
        return rounds

    def _write(self, rounds: Sequence[Round]) -> None:
        plain = {"objective": self._objective[0], "mode": self._objective[1], "rounds": [_plain(one) for one in rounds]}
        with replacing(self._runner.folder / FILE) as partial:
            partial.write_text(json.dumps(plain, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def round_sizes(count: int, keep: float) -> list[int]:
    """How many combinations each round has, down to one: `[8, 4, 2, 1]` of 8 where half of them is kept."""
    sizes = [count]
    while sizes[-1] > 1:
        sizes.append(max(1, min(sizes[-1] - 1, math.floor(sizes[-1] * keep + 0.5))))
    return sizes


def best(ends: Sequence[Done], count: int, mode: str) -> list[int]:
    """Positions of the best finished ones, in their order."""
    sign = 1.0 if mode == "min" else -1.0
    scored = [
        (sign * one.status.objective, index)
        for index, one in enumerate(ends)
        if one.status.status == FINISHED and one.status.objective is not None
    ]
    return sorted(index for _, index in sorted(scored)[:count])


def scaled(job: Job, share: float, what: Scaled) -> list[str]:
    """The overrides of a job with a share of its clips and epochs, their product where both are scaled.

    At least one of each.

    Raises:
        UserError: It is not known how many clips there are.
    """
    config = job.config
    assert config is not None
    if share == 1.0:
        return [*job.overrides]
    each = math.sqrt(share) if what is Scaled.both else share
    more = []
    if what is not Scaled.epochs:
        more.append(f"data.max_clips={max(1, math.ceil(num_clips(config) * each))}")
    if what is not Scaled.clips:
        stages = {
            name: max(1, round(stage.epochs * each)) if stage.epochs else 0
            for name, stage in config.tuning.stages.items()
        }
        more.append(f"tuning.epochs={sum(stages.values())}")
        more += [f"tuning.align_epochs={stages['align']}"] if isinstance(config.tuning, TwoStageConfig) else []
    keys = {override.partition("=")[0] for override in more}
    return [*(override for override in job.overrides if override.partition("=")[0] not in keys), *more]


def num_clips(config: Config | None) -> int:
    """Training clips of the last round.

    Raises:
        UserError: It is not known.
    """
    assert config is not None
    if config.data.max_clips is not None:
        return config.data.max_clips
    if isinstance(config.data, DemoDataConfig):
        return config.data.demo.num_train
    raise UserError(
        "sweep=halving takes shares of data.max_clips, which has no value; give the clips of the last round"
    )


def _named(job: Job, index: int, count: int) -> str:
    return f"{job.name}, round {index + 1}/{count}"


def _plain(one: Round) -> dict[str, Any]:
    return {
        "share": round(one.share, 4),
        "jobs": [
            {
                "name": job.name,
                "folder": str(end.number),
                "overrides": list(job.overrides),
                "status": end.status.status,
                "objective": end.status.objective,
                "is_kept": kept,
            }
            for job, end, kept in zip(one.jobs, one.ends, one.kept, strict=True)
        ],
    }
