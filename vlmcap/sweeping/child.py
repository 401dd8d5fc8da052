"""A job as bytes that another process runs, as Hydra's own launchers for other processes send it.

`python -m vlmcap.sweeping.child` is a process of one job, which it reads from its standard input.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict

from vlmcap.compose import register_schemas
from vlmcap.program import HYDRA_FOLDER


class Packer:
    """Packs jobs.

    Args:
        context: Hydra's.
        task: What a job does.
        master: The configuration of the program around the jobs.
    """

    def __init__(self, context: HydraContext, task: TaskFunction, master: DictConfig) -> None:
        self._context, self._task, self._master = context, task, master

    def pack(self, overrides: Sequence[str], number: int) -> tuple[bytes, Path]:
        """A job for `run_packed`, and the folder that it will write to, which is made."""
        import cloudpickle
        from hydra.core.singleton import Singleton

        config = self._context.config_loader.load_sweep_config(self._master, [*overrides])
        with open_dict(config):
            config.hydra.job.id = config.hydra.job.num = number
        folder = Path(config.hydra.sweep.dir) / str(config.hydra.sweep.subdir)
        (folder / HYDRA_FOLDER).mkdir(parents=True, exist_ok=True)
        # A task of a script, which is no module that can be imported elsewhere, travels by value.
        return cloudpickle.dumps((self._context, self._task, config, Singleton.get_state())), folder


def run_packed(packed: bytes) -> None:
    """Runs a job here; how it ended stands in its `status.json`."""
    import cloudpickle
    from hydra.core.singleton import Singleton
    from hydra.core.utils import run_job, setup_globals

    register_schemas()
    context, task, config, state = cloudpickle.loads(packed)
    sys.argv = [
        "vlmcap",
        *config.hydra.overrides.task,
    ]  # whatever the launcher's process is, the job is one of `vlmcap train`
    setup_globals()
    Singleton.set_state(state)
    run_job(
        hydra_context=context,
        task_function=task,
        config=config,
        job_dir_key="hydra.sweep.dir",
        job_subdir_key="hydra.sweep.subdir",
    )


if __name__ == "__main__":
    run_packed(sys.stdin.buffer.read())
