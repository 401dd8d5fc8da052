"""`launcher=submitit`: a Slurm job a combination, as one array, or the same on this computer to try it.

On submitit itself: Hydra's launcher for it gives up at the first job that fails, while the others still run.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlmcap.config import LauncherConfig
from vlmcap.sweeping.launchers.packing import Packer, needed, run_packed, say_ended


class SubmititLauncher:
    """Submits jobs and waits for them.

    Args:
        launcher: What each is given.
        packer: Packs them.

    Raises:
        UserError: submitit is not installed.
    """

    def __init__(self, launcher: LauncherConfig, packer: Packer) -> None:
        self._submitit, self._launcher, self._packer = needed("submitit", "submitit"), launcher, packer

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> None:
        """Submits all jobs as an array, and returns when all are over."""
        packed = [self._packer.pack(overrides, initial_job_idx + index) for index, overrides in enumerate(job_overrides)]
        folder = packed[0][1].parent / ".submitit" / "%j"
        executor = self._submitit.AutoExecutor(folder=str(folder), cluster="local" if self._launcher.is_local else "slurm")
        executor.update_parameters(**parameters(self._launcher))
        jobs = executor.map_array(run_packed, [one for one, _ in packed])
        self._await([*zip(jobs, (target for _, target in packed), strict=True)])

    def _await(self, jobs: list[tuple[Any, Path]]) -> None:
        try:
            for job, target in jobs:
                job.wait()  # one that was killed leaves no status, and the others go on
                say_ended(target)
        except BaseException:
            for job, _ in jobs:
                job.cancel()
            raise


def parameters(launcher: LauncherConfig) -> dict[str, Any]:
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
