"""Launchers, which start the jobs of a sweep: in this process, in one process per GPU, on Slurm, or on Ray."""

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
from vlmcap.libraries import usable_processors
from vlmcap.sweeping.child import JobPacker, run_packed
from vlmcap.sweeping.job import BEGUN, read_status
from vlmcap.sweeping.runner import JobLauncher

L = TypeVar("L", bound=ParallelLauncherConfig)
LOG = "output.log"  # printed output of a run, in its folder


def num_parallel(launcher: LauncherConfig) -> int:
    """Returns the number of jobs that a search runs in parallel."""
    if not isinstance(launcher, ParallelLauncherConfig):
        return 1
    return len(device_shares(launcher, visible_devices()))


def batch_size(launcher: LauncherConfig) -> int | None:
    """Returns the number of jobs passed to one call of the launcher; None passes all, which it schedules itself."""
    if not isinstance(launcher, ParallelLauncherConfig):
        return 1  # so that the line of a job precedes its output
    return launcher.n_jobs if isinstance(launcher, SubmititLauncherConfig) and launcher.is_local else None


def visible_devices() -> list[str]:
    """Returns the GPUs of this process as named in CUDA_VISIBLE_DEVICES, without initialising CUDA."""
    # "0,1", or UUIDs of GPUs; empty hides all of them.
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name.strip() for name in named.split(",") if name.strip()]
    import torch

    return [str(index) for index in range(torch.cuda.device_count())]


def device_shares(launcher: ParallelLauncherConfig, devices: list[str]) -> list[str]:
    """Returns CUDA_VISIBLE_DEVICES for each parallel job; if there are more jobs than GPUs, jobs share them.

    Args:
        launcher: Number of parallel jobs and of GPUs per job.
        devices: Result of `visible_devices`.
    """
    # None means one GPU per job, 0 means jobs on the CPU.
    size = launcher.gpus_per_job if launcher.gpus_per_job is not None else 1
    groups = (
        # GPUs that do not fill a group stay unused.
        [",".join(devices[start : start + size]) for start in range(0, len(devices) - size + 1, size)] if size else []
    )
    # Without GPUs and without `n_jobs`, one job at a time.
    count = launcher.n_jobs or len(groups) or 1
    return [groups[index % len(groups)] if groups else "" for index in range(count)]


def import_library(library: str) -> Any:
    """Imports the library of a launcher, which has the launcher's name.

    Raises:
        UserError: The library is not installed.
    """
    try:
        # All launchers send jobs by cloudpickle.
        import_module("cloudpickle")
        return import_module(library)
    except ImportError as error:
        extra = "slurm" if library == "submitit" else library
        raise UserError(f'launcher={library} needs {library}: pip install "vlmcap[{extra}]"') from error


def print_result(folder: Path) -> None:
    """Prints one line with the result of a job that another process ran."""
    status = read_status(folder)
    if status is None or status.reason == BEGUN:
        print(f"Job {folder.name}: ended without writing its status", flush=True)
    else:
        print(f"Job {folder.name}: {status.status}{': ' if status.reason else ''}{status.reason}", flush=True)


class _Launcher(Generic[L]):
    """Base of launchers whose jobs run in processes of their own.

    Args:
        launcher: Resources per job, and number of parallel jobs.
        packer: Serializes jobs.

    Raises:
        UserError: The library is not installed.
    """

    library: ClassVar[str]  # name of the library's module and of the launcher

    def __init__(self, launcher: L, packer: JobPacker) -> None:
        self._library, self._launcher, self._packer = import_library(self.library), launcher, packer

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> None:
        """Runs all jobs, as many in parallel as the launcher allows; returns when all have ended."""
        self._run(
            [self._packer.pack(overrides, initial_job_idx + index) for index, overrides in enumerate(job_overrides)]
        )

    def _run(self, packed: list[tuple[bytes, Path]]) -> None:
        """Runs serialized jobs, each given with its folder."""
        raise NotImplementedError


class JoblibLauncher(_Launcher[ParallelLauncherConfig]):
    """`launcher=joblib`: parallel jobs on this computer, each in a new process that sees only its own GPUs.

    joblib schedules threads, each of which starts a process. joblib's own worker processes are not used: if the system
    kills one, the others end too, and a reused one keeps the GPU of its previous job.
    """

    library = "joblib"

    def _run(self, packed: list[tuple[bytes, Path]]) -> None:
        # Each job takes a share of the GPUs, and returns it for the next one.
        free: queue.Queue[str] = queue.Queue()
        shares = device_shares(self._launcher, visible_devices())
        for share in shares:
            free.put(share)
        # joblib only schedules the threads that wait for the processes.
        run = self._library.delayed(self._run_one)
        environment = self._environment(len(shares))
        self._library.Parallel(n_jobs=len(shares), backend="threading")(run(*one, free, environment) for one in packed)

    def _run_one(self, packed: bytes, folder: Path, free: queue.Queue[str], environment: dict[str, str]) -> None:
        share = free.get()
        try:
            with (folder / LOG).open("ab") as log:
                command = [sys.executable, "-m", "vlmcap.sweeping.child"]
                # The job is sent through a pipe, as another user could replace a file of pickled code.
                subprocess.run(
                    command,
                    input=packed,
                    env=environment | {"CUDA_VISIBLE_DEVICES": share},
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    # The status file has the result, whatever the exit code is.
                    check=False,
                )
        finally:
            free.put(share)
        print_result(folder)

    def _environment(self, num_jobs: int) -> dict[str, str]:
        """Returns the environment of a job: the module search path of this process, and a share of the cores."""
        cores = self._launcher.cpus_per_job or max(1, usable_processors() // num_jobs)
        # The user's own OMP_NUM_THREADS wins, because the environment comes second.
        return {"OMP_NUM_THREADS": str(cores)} | dict(os.environ) | _module_paths()


class RayLauncher(_Launcher[RayLauncherConfig]):
    """`launcher=ray`: one Ray task per combination, on this computer or on a cluster; Ray assigns the GPUs."""

    library = "ray"

    def _run(self, packed: list[tuple[bytes, Path]]) -> None:
        cpus, is_local = self._launcher.cpus_per_job or 1, self._launcher.address is None
        gpus = self._launcher.gpus_per_job
        # A cluster is assumed to have GPUs, even if this computer has none.
        if gpus is None:
            gpus = 1 if not is_local or visible_devices() else 0
        # Ray runs as many jobs as the CPUs that it was started with allow.
        started = {"num_cpus": cpus * self._launcher.n_jobs} if is_local and self._launcher.n_jobs else {}
        self._library.init(
            self._launcher.address,
            include_dashboard=False if is_local else None,  # a cluster has its own
            runtime_env={"env_vars": _module_paths()},
            **started,
        )
        try:
            # One process per job, without retries: `sweep.resume=true` restarts a job from its last checkpoint.
            task = self._library.remote(num_cpus=cpus, num_gpus=gpus, max_calls=1, max_retries=0)(run_packed)
            targets = {task.remote(one): folder for one, folder in packed}
            waiting = [*targets]
            while waiting:
                # One at a time, so that results are printed as they come.
                (done, *_), waiting = self._library.wait(waiting, num_returns=1)
                try:
                    self._library.get(done)
                except self._library.exceptions.RayError as error:
                    print(f"Job {targets[done].name}: {first_line(error)}", flush=True)
                print_result(targets[done])
        finally:
            self._library.shutdown()


class SubmititLauncher(_Launcher[SubmititLauncherConfig]):
    """`launcher=submitit`: one job per combination in a Slurm array, or locally with `launcher.is_local=true`.

    It calls submitit directly, because Hydra's submitit launcher stops at the first failure while other jobs still run.
    """

    library = "submitit"

    def _run(self, packed: list[tuple[bytes, Path]]) -> None:
        # submitit replaces %j by the id of the Slurm job.
        folder = packed[0][1].parent / ".submitit" / "%j"
        executor = self._library.AutoExecutor(
            folder=str(folder), cluster="local" if self._launcher.is_local else "slurm"
        )
        executor.update_parameters(**parameters(self._launcher))
        # One array, of which Slurm runs `n_jobs` at the same time.
        jobs = executor.map_array(run_packed, [one for one, _ in packed])
        try:
            for job, (_, target) in zip(jobs, packed, strict=True):
                job.wait()  # unlike job.result(), it does not raise if the job was killed
                print_result(target)
        except BaseException:  # Ctrl-C or an error here must not leave jobs in the queue
            for job in jobs:
                job.cancel()
            raise


def parameters(launcher: SubmititLauncherConfig) -> dict[str, Any]:
    """Returns the parameters of submitit's executor, for Slurm or for this computer."""
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
    # Slurm's own defaults hold for what is not set.
    return {key: value for key, value in (common | ({} if launcher.is_local else slurm)).items() if value is not None}


def make_launcher(
    launcher: LauncherConfig, context: HydraContext, task: TaskFunction, master: DictConfig
) -> JobLauncher:
    """Creates the launcher of a configuration.

    Args:
        launcher: Settings of the launcher.
        context: Hydra context.
        task: Function that runs a job.
        master: Configuration of the sweep's own program.

    Raises:
        UserError: The library of the launcher is not installed.
    """
    native: dict[str, Any] = {kind.library: kind for kind in (JoblibLauncher, RayLauncher, SubmititLauncher)}
    if launcher.kind in native:
        job_launcher: JobLauncher = native[launcher.kind](launcher, JobPacker(context, task, master))
        return job_launcher
    from hydra.core.plugins import Plugins

    return Plugins.instance().instantiate_launcher(hydra_context=context, task_function=task, config=master)


def _module_paths() -> dict[str, str]:
    return {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
