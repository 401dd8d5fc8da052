"""`launcher=joblib`: some jobs at a time on this computer, each in a fresh process that sees its own GPU and no other.

joblib hands the jobs out; their processes are not joblib's own, as one that the system kills would end the others with it, and one that is
used again keeps the GPU that it had.
"""

from __future__ import annotations

import os
import queue
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from vlmcap.config import LauncherConfig
from vlmcap.sweeping.launchers.devices import shares, visible_devices
from vlmcap.sweeping.launchers.packing import LOG, Packer, needed, say_ended


class JoblibLauncher:
    """Starts jobs.

    Args:
        launcher: How many at a time.
        packer: Packs them.

    Raises:
        UserError: joblib is not installed.
    """

    def __init__(self, launcher: LauncherConfig, packer: Packer) -> None:
        self._joblib, self._packer, self._cpus = needed("joblib", "joblib"), packer, launcher.cpus_per_job
        self.shares = shares(launcher, visible_devices())

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> None:
        """Runs all jobs, as many at a time as there are shares; returns when all are over."""
        free: queue.Queue[str] = queue.Queue()
        for share in self.shares:
            free.put(share)
        packed = [self._packer.pack(overrides, initial_job_idx + index) for index, overrides in enumerate(job_overrides)]
        run = self._joblib.delayed(self._run)
        self._joblib.Parallel(n_jobs=len(self.shares), backend="threading")(run(one, folder, free) for one, folder in packed)

    def _run(self, packed: bytes, folder: Path, free: queue.Queue[str]) -> None:
        share = free.get()
        try:
            with (folder / LOG).open("ab") as log:
                command = [sys.executable, "-m", "vlmcap.sweeping.launchers.child"]
                # By a pipe: bytes that are run must not lie where another could exchange them.
                subprocess.run(command, input=packed, env=self._environment(share), stdout=log, stderr=subprocess.STDOUT, check=False)
        finally:
            free.put(share)
        say_ended(folder)

    def _environment(self, share: str) -> dict[str, str]:
        """With the modules that this process finds, one share of the GPUs, and one of the cores."""
        cores = self._cpus or max(1, (os.cpu_count() or 1) // len(self.shares))
        own = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "CUDA_VISIBLE_DEVICES": share}
        return {"OMP_NUM_THREADS": str(cores)} | dict(os.environ) | own
