"""Starts the jobs of a sweep in its folder, takes finished ones as they are, and keeps what became of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from vlmcap.compose import write_yaml
from vlmcap.errors import UserError, first_line
from vlmcap.locks import living_owner
from vlmcap.overrides import quoted
from vlmcap.program import HYDRA_FOLDER
from vlmcap.sweeping.composing import Job
from vlmcap.sweeping.job import (
    BEGUN,
    FAILED,
    FILE,
    FINISHED,
    INTERRUPTED,
    PRUNED,
    REFUSED,
    TRIAL_VARIABLE,
    Status,
    read_status,
)


class Starter(Protocol):
    """Hydra's launchers, and ours."""

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> object:
        """Runs jobs and returns when all are over; what became of them stands in their folders."""


@dataclass(frozen=True, slots=True)
class Done:
    """A job and what became of it.

    Attributes:
        job: The combination.
        number: The name of its folder.
        status: Its end.
        is_new: Whether it ran now.
    """

    job: Job
    number: int
    status: Status
    is_new: bool = True

    @property
    def is_failure(self) -> bool:
        """Whether it came to nothing."""
        return self.status.status not in (FINISHED, PRUNED)


class Runner:
    """The jobs of one sweep.

    Args:
        folder: Of the sweep.
        starter: Starts them.
        is_resumed: Whether the folder holds an earlier part of this sweep.
        batch_size: Jobs that are started together, each batch when the one before is over; None is all.

    Raises:
        UserError: The folder holds a sweep, and it is not to go on.
    """

    def __init__(self, folder: Path, starter: Starter, *, is_resumed: bool, batch_size: int | None) -> None:
        self.folder, self._starter, self._batch_size = folder, starter, batch_size
        self.done: list[Done] = []
        found = sorted(int(child.name) for child in folder.iterdir() if child.name.isdigit()) if folder.is_dir() else []
        if found and not is_resumed:
            raise UserError(
                f"sweep.folder={folder} holds a sweep; add sweep.resume=true to go on with it, or give another folder"
            )
        self._next = found[-1] + 1 if found else 0
        statuses = ((number, read_status(folder / str(number))) for number in found)
        self._known = {
            status.config_hash: number for number, status in statuses if status is not None and status.config_hash
        }

    def run(self, jobs: Sequence[Job]) -> list[Done]:
        """Runs what has not been run, and gives the end of every job, in their order."""
        numbers = [self._number(job) for job in jobs]  # of jobs that come to the same, one runs
        ends: dict[int, Done] = {}
        waiting: dict[int, Job] = {}
        for number, job in zip(numbers, jobs, strict=True):
            status = read_status(self.folder / str(number))
            if status is not None and status.is_finished:
                print(f"Job {number}, {job.name}: finished before.", flush=True)
                ends[number] = Done(job, number, status, is_new=False)
            elif job.refusal:
                ends[number] = self._refuse(number, job)
            elif owner := living_owner(self.folder / str(number)):  # a job that outlived an earlier start of the sweep
                print(f"Job {number}, {job.name}: it still runs, {owner}", flush=True)
                ends[number] = Done(job, number, Status(INTERRUPTED, f"it still runs, {owner}"))
            else:
                waiting[number] = job
        self.done += ends.values()
        pairs = list(waiting.items())
        size = self._batch_size or max(1, len(pairs))
        for start in range(0, len(pairs), size):
            ends |= {one.number: one for one in self._launch(pairs[start : start + size])}
        return [ends[number] for number in numbers]

    def _number(self, job: Job) -> int:
        """The folder of a job: that of an earlier start where there is one."""
        key = job.config_hash
        if key is not None and key in self._known:
            return self._known[key]
        number, self._next = self._next, self._next + 1
        if key is not None:
            self._known[key] = number
        return number

    def _refuse(self, number: int, job: Job) -> Done:
        """Writes down a combination whose configuration is wrong; nothing is started for it."""
        target = self.folder / str(number)
        print(f"Job {number}, {job.name}: refused: {job.refusal}", flush=True)
        status = Status(REFUSED, job.refusal, "UserError", None, job.overrides)
        status.write(target)
        (target / HYDRA_FOLDER).mkdir(exist_ok=True)
        write_yaml([*job.overrides], target / HYDRA_FOLDER / "overrides.yaml")
        return Done(job, number, status)

    def _launch(self, batch: Sequence[tuple[int, Job]]) -> list[Done]:
        for number, job in batch:
            print(f"Job {number}, {job.name}: {self.folder / str(number)}", flush=True)
        problem = ""
        try:
            self._starter.launch([self._overrides(number, job) for number, job in batch], batch[0][0])
        except Exception as error:
            problem = first_line(error)
            if not any((self.folder / str(number) / FILE).is_file() for number, _ in batch):
                raise UserError(f"the jobs could not be started: {problem}") from error
        finally:
            ends = [self._ended(number, job, problem) for number, job in batch]
            self.done += ends
        return ends

    def _overrides(self, number: int, job: Job) -> list[str]:
        trial = [f"++hydra.job.env_set.{TRIAL_VARIABLE}={quoted(job.trial)}"] if job.trial else []
        return [
            *job.overrides,
            f"hydra.sweep.dir={quoted(str(self.folder))}",
            f"hydra.sweep.subdir={quoted(number)}",
            *trial,
        ]

    def _ended(self, number: int, job: Job, problem: str) -> Done:
        """What a job left; one that was killed could not say so itself."""
        target = self.folder / str(number)
        status = read_status(target)
        if owner := living_owner(target):
            return Done(job, number, Status(INTERRUPTED, f"it still runs, {owner}"))
        if status is None or (status.status == INTERRUPTED and status.reason == BEGUN):
            reason = f"its process ended without a word{': ' + problem if problem else ', as one that the system kills for its memory'}"
            status = Status(FAILED, reason, None, job.config_hash, job.overrides)
            status.write(target)
        return Done(job, number, status)
