"""Runs the jobs of a sweep in its folder, except finished ones, and collects their results."""

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
    FINISHED,
    INTERRUPTED,
    PRUNED,
    REFUSED,
    STATUS_FILE,
    TRIAL_VARIABLE,
    Status,
    read_status,
)


class JobLauncher(Protocol):
    """Interface of Hydra's launchers and of those in `vlmcap.sweeping.launchers`."""

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> object:
        """Runs jobs and returns when all have ended; their folders hold the results."""


@dataclass(frozen=True, slots=True)
class JobResult:
    """A job and its result.

    Attributes:
        job: The job.
        number: Number of the job, which is the name of its folder.
        status: Status at its end.
        is_new: False if an earlier start of the sweep had finished it.
    """

    job: Job
    number: int
    status: Status
    is_new: bool = True

    @property
    def is_failure(self) -> bool:
        """Whether the job gave no result: it neither finished nor was pruned."""
        return self.status.status not in (FINISHED, PRUNED)


class Runner:
    """Runs the jobs of one sweep.

    Args:
        folder: Folder of the sweep.
        launcher: Launcher that runs the jobs.
        is_resumed: Whether to continue the sweep in the folder.
        batch_size: Number of jobs passed to the launcher at a time; None passes all.

    Raises:
        UserError: The folder holds a sweep and `is_resumed` is not set.
    """

    def __init__(self, folder: Path, launcher: JobLauncher, *, is_resumed: bool, batch_size: int | None) -> None:
        self.folder, self._launcher, self._batch_size = folder, launcher, batch_size
        self.results: list[JobResult] = []
        # Jobs of an earlier start are found by the hash of their configuration, not by their number.
        jobs = sorted(int(child.name) for child in folder.iterdir() if child.name.isdigit()) if folder.is_dir() else []
        if jobs and not is_resumed:
            raise UserError(
                f"sweep.folder={folder} already holds a sweep; set sweep.resume=true to continue it, or another folder"
            )
        self._next = jobs[-1] + 1 if jobs else 0
        statuses = ((number, read_status(folder / str(number))) for number in jobs)
        self._known = {
            status.config_hash: number for number, status in statuses if status is not None and status.config_hash
        }

    def run(self, jobs: Sequence[Job]) -> list[JobResult]:
        """Runs the jobs that have not finished yet; returns the results of all jobs in their order."""
        numbers = [self._number(job) for job in jobs]  # equivalent jobs share a number and run once
        results: dict[int, JobResult] = {}
        waiting: dict[int, Job] = {}
        for number, job in zip(numbers, jobs, strict=True):
            status = read_status(self.folder / str(number))
            if status is not None and status.is_finished:
                print(f"Job {number}, {job.name}: already finished", flush=True)
                results[number] = JobResult(job, number, status, is_new=False)
            # Refusals are written again, as another version may give another reason.
            elif job.refusal:
                results[number] = self._refuse(number, job)
            elif owner := living_owner(self.folder / str(number)):  # a job that outlived an earlier start of the sweep
                print(f"Job {number}, {job.name}: still running, {owner}", flush=True)
                results[number] = JobResult(job, number, Status(INTERRUPTED, f"still running, {owner}"))
            else:
                # A dictionary by number, so that equivalent jobs are started once.
                waiting[number] = job
        # These are recorded now, so that the table is complete even if the launcher is interrupted.
        self.results += results.values()
        pairs = list(waiting.items())
        size = self._batch_size or max(1, len(pairs))
        for start in range(0, len(pairs), size):
            results |= {one.number: one for one in self._launch(pairs[start : start + size])}
        return [results[number] for number in numbers]

    def _number(self, job: Job) -> int:
        """Returns the number of a job: the one from an earlier start of the sweep if there is one."""
        key = job.config_hash
        if key is not None and key in self._known:
            return self._known[key]
        number, self._next = self._next, self._next + 1
        if key is not None:
            self._known[key] = number
        return number

    def _refuse(self, number: int, job: Job) -> JobResult:
        """Records a combination whose configuration is invalid; nothing is started for it."""
        target = self.folder / str(number)
        print(f"Job {number}, {job.name}: refused: {job.refusal}", flush=True)
        status = Status(REFUSED, job.refusal, "UserError", None, job.overrides)
        status.write(target)
        (target / HYDRA_FOLDER).mkdir(exist_ok=True)
        write_yaml([*job.overrides], target / HYDRA_FOLDER / "overrides.yaml")
        return JobResult(job, number, status)

    def _launch(self, batch: Sequence[tuple[int, Job]]) -> list[JobResult]:
        for number, job in batch:
            print(f"Job {number}, {job.name}: {self.folder / str(number)}", flush=True)
        problem = ""
        try:
            self._launcher.launch([self._overrides(number, job) for number, job in batch], batch[0][0])
        except Exception as error:
            problem = first_line(error)
            # Without any status, the launcher itself failed; otherwise each job's status tells its end.
            if not any((self.folder / str(number) / STATUS_FILE).is_file() for number, _ in batch):
                raise UserError(f"the jobs could not be started: {problem}") from error
        # Also after Ctrl-C: the results so far are in the table that is printed then.
        finally:
            results = [self._result(number, job, problem) for number, job in batch]
            self.results += results
        return results

    def _overrides(self, number: int, job: Job) -> list[str]:
        # Hydra sets this variable in the process of the job.
        trial = [f"++hydra.job.env_set.{TRIAL_VARIABLE}={quoted(job.trial)}"] if job.trial else []
        return [
            *job.overrides,
            # Folder and number are set here, because Hydra would count jobs from 0 again after a resume.
            f"hydra.sweep.dir={quoted(str(self.folder))}",
            f"hydra.sweep.subdir={quoted(number)}",
            *trial,
        ]

    def _result(self, number: int, job: Job, problem: str) -> JobResult:
        """Reads the result of a job; for a job that was killed, it writes the status."""
        target = self.folder / str(number)
        status = read_status(target)
        # An owner that still writes must not get another status under its hands.
        if owner := living_owner(target):
            return JobResult(job, number, Status(INTERRUPTED, f"still running, {owner}"))
        if status is None or (status.status == INTERRUPTED and status.reason == BEGUN):
            why = f": {problem}" if problem else "; the system may have killed it to free memory"
            reason = f"its process ended without writing its status{why}"
            status = Status(FAILED, reason, None, job.config_hash, job.overrides)
            status.write(target)
        return JobResult(job, number, status)
