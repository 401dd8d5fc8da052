"""`launcher=ray`: a Ray task a combination, on this computer or on a cluster; Ray gives each its own GPUs."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from vlmcap.config import LauncherConfig
from vlmcap.errors import first_line
from vlmcap.sweeping.launchers.devices import visible_devices
from vlmcap.sweeping.launchers.packing import Packer, needed, run_packed, say_ended


class RayLauncher:
    """Starts jobs.

    Args:
        launcher: What each is given, and where the cluster is.
        packer: Packs them.

    Raises:
        UserError: Ray is not installed.
    """

    def __init__(self, launcher: LauncherConfig, packer: Packer) -> None:
        self._ray, self._launcher, self._packer = needed("ray", "ray"), launcher, packer

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> None:
        """Runs all jobs, as many at a time as there are GPUs and cores for; returns when all are over."""
        packed = [self._packer.pack(overrides, initial_job_idx + index) for index, overrides in enumerate(job_overrides)]
        cpus, is_own = self._launcher.cpus_per_job or 1, self._launcher.address is None
        gpus = self._launcher.gpus_per_job
        if gpus is None:
            gpus = 1 if not is_own or visible_devices() else 0
        started = {"num_cpus": cpus * self._launcher.n_jobs} if is_own and self._launcher.n_jobs else {}
        paths = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        self._ray.init(self._launcher.address, include_dashboard=False if is_own else None, runtime_env={"env_vars": paths}, **started)
        try:
            # A process a job, which is not started again by itself: `sweep.resume=true` does, from its last checkpoint.
            task = self._ray.remote(num_cpus=cpus, num_gpus=gpus, max_calls=1, max_retries=0)(run_packed)
            targets = {task.remote(one): folder for one, folder in packed}
            waiting = [*targets]
            while waiting:
                (done, *_), waiting = self._ray.wait(waiting, num_returns=1)
                try:
                    self._ray.get(done)
                except self._ray.exceptions.RayError as error:
                    print(f"Job {targets[done].name}: {first_line(error)}", flush=True)
                say_ended(targets[done])
        finally:
            self._ray.shutdown()
