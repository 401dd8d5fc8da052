"""What starts jobs: in this process, in one process a GPU, on Slurm, on Ray."""

from __future__ import annotations

import os
import queue
import subprocess
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from vlmcap.config import LauncherConfig, ParallelLauncherConfig, RayLauncherConfig, SubmititLauncherConfig
from vlmcap.errors import UserError, first_line
from vlmcap.sweeping.child import Packer, run_packed
from vlmcap.sweeping.job import BEGUN, read_status
from vlmcap.sweeping.runner import Starter

L = TypeVar("L", bound=ParallelLauncherConfig)
LOG = "output.log"  # in the folder of the run: what it printed


def num_parallel(launcher: LauncherConfig) -> int:
    """Jobs that a search starts at a time."""
    if not isinstance(launcher, ParallelLauncherConfig):
        return 1
    return len(shares(launcher, visible_devices()))


def batch_size(launcher: LauncherConfig) -> int | None:
    """Jobs that one call of the launcher is given.

    None is all of them, of which it runs as many at a time as it may.
    """
    if not isinstance(launcher, ParallelLauncherConfig):
        return 1  # the line of a job stands in front of what it prints
    return launcher.n_jobs if isinstance(launcher, SubmititLauncherConfig) and launcher.is_local else None


def visible_devices() -> list[str]:
    """Names of the GPUs that this process may use, as CUDA_VISIBLE_DEVICES has them; the GPUs stay untouched."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name.strip() for name in named.split(",") if name.strip()]
    import torch

    return [str(index) for index in range(torch.cuda.device_count())]


def shares(launcher: ParallelLauncherConfig, devices: list[str]) -> list[str]:
    """CUDA_VISIBLE_DEVICES of each job that runs at a time; with more jobs than GPUs they share them.

    Args:
        launcher: How many at a time, and GPUs for each.
        devices: Of `visible_devices`.
    """
    size = launcher.gpus_per_job if launcher.gpus_per_job is not None else 1
    groups = (
        [",".join(devices[start : start + size]) for start in range(0, len(devices) - size + 1, size)] if size else []
    )
    count = launcher.n_jobs or len(groups) or 1
    return [groups[index % len(groups)] if groups else "" for index in range(count)]


def needed(library: str) -> Any:
    """The library of a launcher, which is of the same name.

    Raises:
        UserError: It is not installed.
    """
    try:
        import_module("cloudpickle")
        return import_module(library)
    except ImportError as error:
        extra = "slurm" if library == "submitit" else library
        raise UserError(f'launcher={library} needs {library}: pip install "vlmcap[{extra}]"') from error


def say_ended(folder: Path) -> None:
    """One line for a job that another process ran."""
    status = read_status(folder)
    word, reason = (status.status, status.reason) if status and status.reason != BEGUN else ("ended without a word", "")
    print(f"Job {folder.name}: {word}{': ' if reason else ''}{reason}", flush=True)


class _Launcher(Generic[L]):
    """A launcher whose jobs run in processes of their own.

    Args:
        launcher: What each job is given, and how many run at a time.
        packer: Makes the bytes that the processes run.

    Raises:
        UserError: The library is not installed.
    """

    library: ClassVar[str]  # its module, and the name of the launcher

    def __init__(self, launcher: L, packer: Packer) -> None:
        self._library, self._launcher, self._packer = needed(self.library), launcher, packer

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> None:
        """Runs all jobs, as many at a time as may run; returns when all are over."""
        self._run(
            [self._packer.pack(overrides, initial_job_idx + index) for index, overrides in enumerate(job_overrides)]
        )

    def _run(self, packed: list[tuple[bytes, Path]]) -> None:
        """Runs jobs, each with the folder that it writes to."""
        raise NotImplementedError


class JoblibLauncher(_Launcher[ParallelLauncherConfig]):
    """`launcher=joblib`: some jobs at a time on this computer, each in a fresh process that sees its own GPU and no other.

    joblib hands the jobs out; their processes are not joblib's own, as one that the system kills would end the others
    with it, and one that is used again keeps the GPU that it had.
    """

    library = "joblib"

    def _run(self, packed: list[tuple[bytes, Path]]) -> None:
        free: queue.Queue[str] = queue.Queue()
        given = shares(self._launcher, visible_devices())
        for share in given:
            free.put(share)
        run = self._library.delayed(self._run_one)
        environment = self._environment(len(given))
        self._library.Parallel(n_jobs=len(given), backend="threading")(run(*one, free, environment) for one in packed)

    def _run_one(self, packed: bytes, folder: Path, free: queue.Queue[str], environment: dict[str, str]) -> None:
        share = free.get()
        try:
            with (folder / LOG).open("ab") as log:
                command = [sys.executable, "-m", "vlmcap.sweeping.child"]
                own = environment | {"CUDA_VISIBLE_DEVICES": share}
                # By a pipe: bytes that are run must not lie where another could exchange them.
                subprocess.run(command, input=packed, env=own, stdout=log, stderr=subprocess.STDOUT, check=False)
        finally:
            free.put(share)
        say_ended(folder)

    def _environment(self, num_jobs: int) -> dict[str, str]:
        """The environment of a job: the modules that this process finds, and one share of the cores."""
        cores = self._launcher.cpus_per_job or max(1, (os.cpu_count() or 1) // num_jobs)
        return {"OMP_NUM_THREADS": str(cores)} | dict(os.environ) | _module_paths()


class RayLauncher(_Launcher[RayLauncherConfig]):
    """`launcher=ray`: a Ray task for each combination, on this computer or on a cluster.

    Ray gives each its own GPUs.
    """

    library = "ray"

    def _run(self, packed: list[tuple[bytes, Path]]) -> None:
        cpus, is_own = self._launcher.cpus_per_job or 1, self._launcher.address is None
        gpus = self._launcher.gpus_per_job
        if gpus is None:
            gpus = 1 if not is_own or visible_devices() else 0
        started = {"num_cpus": cpus * self._launcher.n_jobs} if is_own and self._launcher.n_jobs else {}
        self._library.init(
            self._launcher.address,
            include_dashboard=False if is_own else None,
            runtime_env={"env_vars": _module_paths()},
            **started,
        )
        try:
            # A process a job, which is not started again by itself: `sweep.resume=true` does, from its last checkpoint.
            task = self._library.remote(num_cpus=cpus, num_gpus=gpus, max_calls=1, max_retries=0)(run_packed)
            targets = {task.remote(one): folder for one, folder in packed}
            waiting = [*targets]
            while waiting:
                (done, *_), waiting = self._library.wait(waiting, num_returns=1)
                try:
                    self._library.get(done)
                except self._library.exceptions.RayError as error:
                    print(f"Job {targets[done].name}: {first_line(error)}", flush=True)
                say_ended(targets[done])
        finally:
            self._library.shutdown()


class SubmititLauncher(_Launcher[SubmititLauncherConfig]):
    """`launcher=submitit`: a Slurm job for each combination, as one array, or the same on this computer to try it.

    It uses submitit itself: Hydra's launcher for it gives up at the first job that fails, while the others still run.
    """

    library = "submitit"

    def _run(self, packed: list[tuple[bytes, Path]]) -> None:
        folder = packed[0][1].parent / ".submitit" / "%j"
        executor = self._library.AutoExecutor(
            folder=str(folder), cluster="local" if self._launcher.is_local else "slurm"
        )
        executor.update_parameters(**parameters(self._launcher))
        jobs = executor.map_array(run_packed, [one for one, _ in packed])
        try:
            for job, (_, target) in zip(jobs, packed, strict=True):
                job.wait()  # one that was killed leaves no status, and the others go on
                say_ended(target)
        except BaseException:
            for job in jobs:
                job.cancel()
            raise


def parameters(launcher: SubmititLauncherConfig) -> dict[str, Any]:
    """What submitit is told, for Slurm or for this computer."""
    common = {
        "name": "vlmcap",
        "timeout_min": launcher.timeout_min,
        "gpus_per_node": launcher.gpus_per_job,
        "cpus_per_task": launcher.cpus_per_job,
        "mem_gb": launcher.mem_gb,
    }
    slurm = {
        "slurm_partition": launcher.partition,
        "slurm_account": launcher.account,
        "slurm_qos": launcher.qos,
        "slurm_array_parallelism": launcher.n_jobs,
        "slurm_setup": launcher.setup,
    }
    return {key: value for key, value in (common | ({} if launcher.is_local else slurm)).items() if value is not None}


def make_launcher(launcher: LauncherConfig, context: HydraContext, task: TaskFunction, master: DictConfig) -> Starter:
    """The launcher of a configuration.

    Args:
        launcher: Which, and with what.
        context: Hydra's.
        task: What a job does.
        master: The configuration of the program around the jobs.

    Raises:
        UserError: Its extra is not installed.
    """
    own: dict[str, Any] = {kind.library: kind for kind in (JoblibLauncher, RayLauncher, SubmititLauncher)}
    if launcher.kind in own:
        made: Starter = own[launcher.kind](launcher, Packer(context, task, master))
        return made
    from hydra.core.plugins import Plugins

    return Plugins.instance().instantiate_launcher(hydra_context=context, task_function=task, config=master)


def _module_paths() -> dict[str, str]:
    return {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
