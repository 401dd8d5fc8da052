"""`sweep=halving`: successive halving (Jamieson and Talwalkar, https://arxiv.org/abs/1502.07943).

All combinations run with few clips and epochs, the better ones run again with more, and so on until one is left, which
runs with all clips and epochs. The cost per combination grows as their number shrinks, so all rounds cost about the
same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vlmcap.config import Config, DemoDataConfig, HalvingSweepConfig, Scaled, TwoStageConfig
from vlmcap.errors import UserError
from vlmcap.files import write_json
from vlmcap.sweeping.composing import Composer, Job
from vlmcap.sweeping.job import FINISHED
from vlmcap.sweeping.runner import JobResult, Runner

ROUNDS_FILE = "halving.json"


@dataclass(frozen=True, slots=True)
class Round:
    """One round.

    Attributes:
        share: Work of a job as a share of the last round's clips times epochs, in (0, 1].
        jobs: Jobs of the remaining combinations.
        results: Results of the jobs, in the same order.
        kept: For each job, whether its combination reaches the next round.
    """

    share: float
    jobs: Sequence[Job]
    results: Sequence[JobResult]
    kept: Sequence[bool]


class Halving:
    """Runs the rounds.

    Args:
        sweep: Settings of the sweep.
        composer: Composes jobs.
        runner: Runs jobs.
        objective: Name of the objective, and `max` or `min`.
    """

    def __init__(
        self, sweep: HalvingSweepConfig, composer: Composer, runner: Runner, objective: tuple[str, str]
    ) -> None:
        self._sweep, self._composer, self._runner, self._objective = sweep, composer, runner, objective

    def check(self, candidates: Sequence[Job]) -> None:
        """Checks that the number of clips, of which rounds take shares, is known for every candidate.

        Raises:
            UserError: It is not known.
        """
        for job in candidates:
            if not job.refusal and self._sweep.scaled is not Scaled.epochs:
                num_clips(job.config)

    def run(self, candidates: Sequence[Job]) -> list[Round]:
        """Runs all rounds and records each in `halving.json`; a resumed sweep finds finished jobs in their folders.

        Args:
            candidates: The combinations, configured for the last round.
        """
        # Refused jobs are recorded once, and take part in no round.
        left = [job for job in candidates if not job.refusal]
        self._runner.run([job for job in candidates if job.refusal])
        sizes = round_sizes(len(left), self._sweep.keep)
        rounds: list[Round] = []
        for index, size in enumerate(sizes):
            # Rounds grow by 1 / keep, up to all clips and epochs in the last one.
            share = self._sweep.keep ** (len(sizes) - 1 - index)
            print(
                f"Round {index + 1} of {len(sizes)}: {len(left)} combinations with {share:.0%} of the last round's "
                "clips and epochs",
                flush=True,
            )
            jobs = [
                # Composed again with fewer clips and epochs, and so with another hash and another folder in each round.
                self._composer.job(
                    scaled(job, share, self._sweep.scaled), f"{job.name}, round {index + 1}/{len(sizes)}"
                )
                for job in left
            ]
            results = self._runner.run(jobs)
            # The last round keeps all of its combinations.
            num_kept = sizes[index + 1] if index + 1 < len(sizes) else size
            chosen = best_jobs(results, num_kept, self._objective[1])
            rounds.append(Round(share, jobs, results, [number in chosen for number in range(len(results))]))
            # After each round, so that a sweep that is stopped leaves the rounds that have ended.
            self._write(rounds)
            left = [left[number] for number in chosen]
            if not left:
                print("No combination of this round finished, so there is no next round.", flush=True)
                break
        return rounds

    def _write(self, rounds: Sequence[Round]) -> None:
        plain = {"objective": self._objective[0], "mode": self._objective[1], "rounds": [_plain(one) for one in rounds]}
        write_json(self._runner.folder / ROUNDS_FILE, plain)


def round_sizes(count: int, keep: float) -> list[int]:
    """Returns the number of combinations in each round, down to one: `round_sizes(8, 0.5) == [8, 4, 2, 1]`."""
    sizes = [count]
    while sizes[-1] > 1:
        sizes.append(max(1, min(sizes[-1] - 1, math.floor(sizes[-1] * keep + 0.5))))
    return sizes


def best_jobs(results: Sequence[JobResult], count: int, mode: str) -> list[int]:
    """Returns the indices of the `count` best finished jobs, in ascending order."""
    # Lower is better after the change of sign.
    sign = 1.0 if mode == "min" else -1.0
    scored = [
        # Equal values are decided by the index, so that a resumed sweep chooses the same jobs.
        (sign * one.status.objective, index)
        for index, one in enumerate(results)
        if one.status.status == FINISHED and one.status.objective is not None
    ]
    return sorted(index for _, index in sorted(scored)[:count])


def scaled(job: Job, share: float, what: Scaled) -> list[str]:
    """Returns the overrides of a job with a share of its clips and epochs, at least one of each.

    If both are scaled, the share is that of their product.

    Raises:
        UserError: The number of clips is not known.
    """
    config = job.config
    assert config is not None
    if share == 1.0:
        return [*job.overrides]
    # With both, the shares of clips and of epochs multiply to `share`.
    each = math.sqrt(share) if what is Scaled.both else share
    changed = []
    if what is not Scaled.epochs:
        changed.append(f"data.max_clips={max(1, math.ceil(num_clips(config) * each))}")
    if what is not Scaled.clips:
        # A stage that trains keeps at least one epoch, and one without epochs gets none.
        stages = {
            name: max(1, round(stage.epochs * each)) if stage.epochs else 0
            for name, stage in config.tuning.stages.items()
        }
        changed.append(f"tuning.epochs={sum(stages.values())}")
        changed += [f"tuning.align_epochs={stages['align']}"] if isinstance(config.tuning, TwoStageConfig) else []
    # Hydra refuses a key that is given twice.
    keys = {override.partition("=")[0] for override in changed}
    return [*(override for override in job.overrides if override.partition("=")[0] not in keys), *changed]


def num_clips(config: Config | None) -> int:
    """Returns the number of training clips of the last round.

    Raises:
        UserError: It is not known.
    """
    assert config is not None
    if config.data.max_clips is not None:
        return config.data.max_clips
    if isinstance(config.data, DemoDataConfig):
        return config.data.demo.num_train
    raise UserError(
        "sweep=halving needs data.max_clips, which has no value; set it to the number of clips of the last round"
    )


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
            for job, end, kept in zip(one.jobs, one.results, one.kept, strict=True)
        ],
    }
