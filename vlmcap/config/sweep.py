"""Settings of a sweep, and of what starts its jobs."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from math import inf

from omegaconf import MISSING

from vlmcap.config.checks import only_with, require, require_positive, require_seed
from vlmcap.config.kinds import register

OF_A_SWEEP = ("sweep=", "sweep.", "launcher=", "launcher.")
"""The beginnings of overrides that a single run does not read."""


class Sampler(Enum):
    """Who proposes the next trial of `sweep=optuna`: a model of those before, chance, or every point of the grid."""

    tpe = "tpe"
    random = "random"
    grid = "grid"


class Scaled(Enum):
    """What a round of `sweep=halving` has less of than the last one."""

    clips = "clips"
    epochs = "epochs"
    both = "both"


class SweepMethod(Enum):
    """How W&B chooses the next run: all combinations, chance, or a model of those before."""

    grid = "grid"
    random = "random"
    bayes = "bayes"


@dataclass
class SweepConfig:
    """A sweep as a whole, which `python train.py -m` runs and `vlmcap plan -m` adds up."""

    kind: str = MISSING
    budget_h: float | None = None  # hours of the GPU that the plan holds it to; null is no limit
    folder: str | None = None  # where its jobs go; null is a new one under multirun/
    resume: bool = False  # take finished jobs of the folder as they are, and go on with unfinished ones

    def __post_init__(self) -> None:
        is_hours = self.budget_h is None or 0 < self.budget_h < inf
        require(is_hours, f"sweep.budget_h must be above 0 hours, or null for no limit, not {self.budget_h}")
        is_known = not self.resume or self.folder is not None
        require(
            is_known,
            "sweep.resume=true goes on with the sweep in sweep.folder, which has no value; give the folder under "
            "multirun/",
        )


@register("sweep")
@dataclass
class GridSweepConfig(SweepConfig):
    """All combinations."""

    kind: str = "grid"


@register("sweep")
@dataclass
class OptunaSweepConfig(SweepConfig):
    """Combinations that are chosen by what came out before."""

    kind: str = "optuna"
    n_trials: int = 20  # those of an earlier start included
    sampler: Sampler = Sampler.tpe
    seed: int = 0  # of the sampler
    prune: bool = True  # stop a trial that is below the median of the others at the same validation
    prune_after_trials: int = only_with(
        "prune=true", lambda c: c.prune, 5
    )  # that must have ended before one is stopped
    prune_after_epochs: int = only_with("prune=true", lambda c: c.prune, 1)  # validations that every trial is left

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive("sweep", self, "n_trials")
        require_seed("sweep.seed", self.seed)
        for key in ("prune_after_trials", "prune_after_epochs"):
            require(getattr(self, key) >= 0, f"sweep.{key} must be 0 or more, not {getattr(self, key)}")


@register("sweep")
@dataclass
class HalvingSweepConfig(SweepConfig):
    """More clips and epochs for the better combinations."""

    kind: str = "halving"
    keep: float = 0.5  # share of the combinations that a round leaves
    scaled: Scaled = Scaled.both  # what an earlier round has less of

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            0 < self.keep < 1, f"sweep.keep must be above 0 and below 1, not {self.keep}: it is the share that goes on"
        )


@register("sweep")
@dataclass
class WandbSweepConfig(SweepConfig):
    """What `vlmcap dashboard --sweep` writes for `wandb sweep` beside the values to try."""

    kind: str = "wandb"
    method: SweepMethod = SweepMethod.bayes
    max_runs: int | None = 20  # of all agents together; null is no limit, and then a grid alone ends by itself

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive("sweep", self, "max_runs")


@dataclass
class LauncherConfig:
    """What starts the jobs of a sweep."""

    kind: str = MISSING


@register("launcher")
@dataclass
class BasicLauncherConfig(LauncherConfig):
    """One job after another, in this process."""

    kind: str = "basic"


@dataclass
class ParallelLauncherConfig(LauncherConfig):
    """Jobs in processes of their own."""

    n_jobs: int | None = None  # at a time; null is one per GPU, or one where there is none
    gpus_per_job: int | None = None  # null is one where there is a GPU
    cpus_per_job: int | None = None  # cores; null shares this computer's

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
    """Processes of this computer, one per GPU."""

    kind: str = "joblib"


@register("launcher")
@dataclass
class SubmititLauncherConfig(ParallelLauncherConfig):
    """Slurm jobs, as one array."""

    kind: str = "submitit"
    gpus_per_job: int | None = 1
    cpus_per_job: int | None = 8
    is_local: bool = False  # processes of this computer in place of Slurm's jobs
    partition: str | None = only_with("is_local=false", lambda c: not c.is_local, None)
    account: str | None = only_with("is_local=false", lambda c: not c.is_local, None)
    qos: str | None = only_with("is_local=false", lambda c: not c.is_local, None)
    timeout_min: int = 60 * 24
    mem_gb: int | None = 64
    setup: list[str] | None = only_with(
        "is_local=false", lambda c: not c.is_local, None
    )  # shell lines in front of each job: `module load cuda`


@register("launcher")
@dataclass
class RayLauncherConfig(ParallelLauncherConfig):
    """Ray tasks, on this computer or on a cluster."""

    kind: str = "ray"
    address: str | None = None  # of a cluster; null starts one on this computer
    n_jobs: int | None = only_with(
        "address=null", lambda c: c.address is None, None
    )  # at a time; null is as many as there are cores for
    cpus_per_job: int | None = 1  # cores
