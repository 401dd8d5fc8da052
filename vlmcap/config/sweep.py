"""Settings of a sweep and of the launcher of its jobs."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from math import inf

from omegaconf import MISSING

from vlmcap.config.checks import only_with, require, require_positive, require_seed
from vlmcap.config.kinds import register

OF_A_SWEEP = ("sweep=", "sweep.", "launcher=", "launcher.")
"""Prefixes of overrides that only a sweep reads."""


class Sampler(Enum):
    """Sampler of `sweep=optuna`: a model of earlier trials, random search, or every point of the grid."""

    tpe = "tpe"
    random = "random"
    grid = "grid"


class Scaled(Enum):
    """What earlier rounds of `sweep=halving` have less of than the last one."""

    clips = "clips"
    epochs = "epochs"
    both = "both"


class SweepMethod(Enum):
    """How W&B chooses the next run: all combinations, random search, or a model of earlier runs."""

    grid = "grid"
    random = "random"
    bayes = "bayes"


@dataclass
class SweepConfig:
    """A sweep, which `python train.py -m` runs and `vlmcap plan -m` plans."""

    kind: str = MISSING  # kind of sweep, which selects the schema
    budget_h: float | None = None  # GPU hours that the planned sweep must not exceed; null is no limit
    folder: str | None = None  # folder of the jobs; null is a new one under multirun/
    resume: bool = False  # keep the finished jobs of the folder, and continue the unfinished ones

    def __post_init__(self) -> None:
        is_hours = self.budget_h is None or 0 < self.budget_h < inf
        require(is_hours, f"sweep.budget_h must be above 0 hours, or null for no limit, not {self.budget_h}")
        is_known = not self.resume or self.folder is not None
        require(
            is_known,
            "sweep.resume=true continues the sweep in sweep.folder, which has no value; set sweep.folder to its folder "
            "under multirun/",
        )


@register("sweep")
@dataclass
class GridSweepConfig(SweepConfig):
    """Runs all combinations."""

    kind: str = "grid"  # kind of sweep


@register("sweep")
@dataclass
class OptunaSweepConfig(SweepConfig):
    """Chooses combinations by the results of earlier ones, with Optuna."""

    kind: str = "optuna"  # kind of sweep
    n_trials: int = 20  # number of trials, including those before a resume
    sampler: Sampler = Sampler.tpe  # how Optuna proposes trials
    seed: int = 0  # seed of the sampler
    prune: bool = True  # stop a trial that is below the median of the others at the same validation
    # Finished trials before the first one may be stopped.
    prune_after_trials: int = only_with("prune=true", lambda c: c.prune, 5)
    # Epochs that every trial may train before it may be stopped.
    prune_after_epochs: int = only_with("prune=true", lambda c: c.prune, 1)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive("sweep", self, "n_trials")
        require_seed("sweep.seed", self.seed)
        for key in ("prune_after_trials", "prune_after_epochs"):
            require(getattr(self, key) >= 0, f"sweep.{key} must be 0 or more, not {getattr(self, key)}")


@register("sweep")
@dataclass
class HalvingSweepConfig(SweepConfig):
    """Successive halving: later rounds train fewer, better combinations with more clips and epochs."""

    kind: str = "halving"  # kind of sweep
    keep: float = 0.5  # share of the combinations that each round keeps, 0 to 1
    scaled: Scaled = Scaled.both  # what earlier rounds have less of

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            0 < self.keep < 1,
            f"sweep.keep is the share of combinations that each round keeps and must be above 0 and below 1, not "
            f"{self.keep}",
        )


@register("sweep")
@dataclass
class WandbSweepConfig(SweepConfig):
    """Settings that `vlmcap dashboard --sweep` writes for `wandb sweep`, with the values to try."""

    kind: str = "wandb"  # kind of sweep
    method: SweepMethod = SweepMethod.bayes  # how W&B chooses the next run
    max_runs: int | None = 20  # largest number of runs of all agents; null is no limit, with which only a grid ends

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive("sweep", self, "max_runs")


@dataclass
class LauncherConfig:
    """Launcher of the jobs of a sweep."""

    kind: str = MISSING  # kind of launcher, which selects the schema


@register("launcher")
@dataclass
class BasicLauncherConfig(LauncherConfig):
    """Runs one job after another in this process."""

    kind: str = "basic"  # kind of launcher


@dataclass
class ParallelLauncherConfig(LauncherConfig):
    """Launchers that run jobs in their own processes."""

    n_jobs: int | None = None  # jobs at a time; null is one per GPU, or one without a GPU
    gpus_per_job: int | None = None  # GPUs per job; null is one if there is a GPU
    cpus_per_job: int | None = None  # CPU cores per job; null divides the cores of this computer

    def __post_init__(self) -> None:
        for key in ("n_jobs", "cpus_per_job", "mem_gb", "timeout_min"):
            value = getattr(self, key, None)
            require(value is None or value >= 1, f"launcher.{key} must be at least 1, or null, not {value}")
        require(
            self.gpus_per_job is None or self.gpus_per_job >= 0,
            f"launcher.gpus_per_job must be 0 or more, not {self.gpus_per_job}",
        )


@register("launcher")
@dataclass
class JoblibLauncherConfig(ParallelLauncherConfig):
    """Runs jobs in processes on this computer, one per GPU."""

    kind: str = "joblib"  # kind of launcher


@register("launcher")
@dataclass
class SubmititLauncherConfig(ParallelLauncherConfig):
    """Runs jobs as one Slurm array."""

    kind: str = "submitit"  # kind of launcher
    gpus_per_job: int | None = 1  # GPUs per job
    cpus_per_job: int | None = 8  # CPU cores per job
    is_local: bool = False  # run jobs as processes on this computer instead of Slurm
    partition: str | None = only_with("is_local=false", lambda c: not c.is_local, None)  # Slurm partition
    account: str | None = only_with("is_local=false", lambda c: not c.is_local, None)  # Slurm account
    qos: str | None = only_with("is_local=false", lambda c: not c.is_local, None)  # Slurm quality of service
    timeout_min: int = 60 * 24  # time limit of a job in minutes
    mem_gb: int | None = 64  # memory per job in GB
    # Shell lines before each job, such as `module load cuda`.
    setup: list[str] | None = only_with("is_local=false", lambda c: not c.is_local, None)


@register("launcher")
@dataclass
class RayLauncherConfig(ParallelLauncherConfig):
    """Runs jobs as Ray tasks, on this computer or on a cluster."""

    kind: str = "ray"  # kind of launcher
    address: str | None = None  # address of a Ray cluster; null starts one on this computer
    # Jobs at a time; null is as many as the cores allow.
    n_jobs: int | None = only_with("address=null", lambda c: c.address is None, None)
    cpus_per_job: int | None = 1  # CPU cores per job
