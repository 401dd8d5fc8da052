"""Settings of a sweep, and of what starts its jobs."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from math import inf

from vlmcap.config.checks import require, require_positive, require_seed


class SweepKind(Enum):
    """How the combinations to run are chosen: all, by what came out before, or more clips and epochs for the better ones."""

    grid = "grid"
    optuna = "optuna"
    halving = "halving"


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
class WandbSweepConfig:
    """What `vlmcap dashboard --sweep` writes for `wandb sweep` beside the values to try."""

    method: SweepMethod = SweepMethod.grid
    max_runs: int | None = None  # of all agents together; null is no limit, and then a grid alone ends by itself

    def __post_init__(self) -> None:
        require(self.max_runs is None or self.max_runs >= 1, f"sweep.wandb.max_runs must be at least 1, or null, not {self.max_runs}")


@dataclass
class SweepConfig:
    """A sweep as a whole, which `python train.py -m` runs and `vlmcap plan -m` adds up."""

    kind: SweepKind = SweepKind.grid
    budget_h: float | None = None  # hours of the card that the plan holds it to; null is no limit
    folder: str | None = None  # where its jobs go; null is a new one under multirun/
    resume: bool = False  # take finished jobs of the folder as they are, and go on with unfinished ones
    n_trials: int = 20  # of optuna, those of an earlier start included
    sampler: Sampler = Sampler.tpe  # of optuna
    seed: int = 0  # of the sampler
    prune: bool = True  # stop a trial of optuna that is below the median of the others at the same validation
    prune_after_trials: int = 5  # that must have ended before one is stopped
    prune_after_epochs: int = 1  # validations that every trial is left
    keep: float = 0.5  # share of the combinations that a round of halving leaves
    scaled: Scaled = Scaled.both  # what an earlier round of halving has less of
    wandb: WandbSweepConfig = field(default_factory=WandbSweepConfig)  # of sweep=wandb

    def __post_init__(self) -> None:
        is_hours = self.budget_h is None or 0 < self.budget_h < inf
        require(is_hours, f"sweep.budget_h must be above 0 hours, or null for no limit, not {self.budget_h}")
        require_positive("sweep", self, "n_trials")
        require_seed("sweep.seed", self.seed)
        for key in ("prune_after_trials", "prune_after_epochs"):
            require(getattr(self, key) >= 0, f"sweep.{key} must be 0 or more, not {getattr(self, key)}")
        require(0 < self.keep < 1, f"sweep.keep must be above 0 and below 1, not {self.keep}: it is the share that goes on")
        is_known = not self.resume or self.folder is not None
        require(is_known, "sweep.resume=true goes on with the sweep in sweep.folder, which has no value; give the folder under multirun/")


class LauncherKind(Enum):
    """What starts the jobs of a sweep."""

    basic = "basic"
    joblib = "joblib"
    submitit = "submitit"
    ray = "ray"


@dataclass
class LauncherConfig:
    """What starts the jobs of a sweep, how many at a time, and with what."""

    kind: LauncherKind = LauncherKind.basic
    n_jobs: int | None = None  # at a time; null is one a GPU, or one where there is none
    gpus_per_job: int | None = None  # null is one where there is a GPU
    cpus_per_job: int | None = None  # cores; null shares this computer's
    is_local: bool = False  # submitit: processes of this computer in place of Slurm's jobs
    address: str | None = None  # of a Ray cluster; null starts one on this computer
    partition: str | None = None  # of Slurm, as are those below
    account: str | None = None
    qos: str | None = None
    timeout_min: int = 60 * 24
    mem_gb: int | None = None
    setup: list[str] | None = None  # shell lines in front of each job: `module load cuda`

    def __post_init__(self) -> None:
        for key in ("n_jobs", "cpus_per_job", "mem_gb"):
            value = getattr(self, key)
            require(value is None or value >= 1, f"launcher.{key} must be at least 1, or null, not {value}")
        require(self.gpus_per_job is None or self.gpus_per_job >= 0, f"launcher.gpus_per_job must be 0 or more, not {self.gpus_per_job}")
        require_positive("launcher", self, "timeout_min")
        is_basic = self.kind is LauncherKind.basic
        require(not is_basic or self.n_jobs in (None, 1), "launcher.n_jobs is of launcher=joblib, submitit or ray; basic runs one by one")
