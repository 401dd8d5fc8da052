"""Serializes jobs for other processes, in the same way as Hydra's launchers, and runs them there.

`python -m vlmcap.sweeping.child` reads one job from its standard input and runs it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict

from vlmcap.compose import register_schemas
from vlmcap.program import HYDRA_FOLDER


class JobPacker:
    """Serializes the jobs of a sweep.

    Args:
        context: Hydra context.
        task: Function that runs a job.
        master: Configuration of the sweep's own program.
    """

    def __init__(self, context: HydraContext, task: TaskFunction, master: DictConfig) -> None:
        self._context, self._task, self._master = context, task, master

    def pack(self, overrides: Sequence[str], number: int) -> tuple[bytes, Path]:
        """Creates the folder of a job; returns the job as bytes for `run_packed`, and the folder."""
        import cloudpickle
        from hydra.core.singleton import Singleton

        config = self._context.config_loader.load_sweep_config(self._master, [*overrides])
        with open_dict(config):
            # Hydra's launchers set these for each job.
            config.hydra.job.id = config.hydra.job.num = number
        folder = Path(config.hydra.sweep.dir) / str(config.hydra.sweep.subdir)
        # The folder exists before the job, so that its output and its status have a place even if it does not start.
        (folder / HYDRA_FOLDER).mkdir(parents=True, exist_ok=True)
        # cloudpickle sends the task of a script by value, as another process cannot import it by name.
        return cloudpickle.dumps((self._context, self._task, config, Singleton.get_state())), folder


def run_packed(packed: bytes) -> None:
    """Runs a job in this process; its result is in its `status.json`."""
    import cloudpickle
    from hydra.core.singleton import Singleton
    from hydra.core.utils import run_job, setup_globals

    # Before unpickling, which needs the schemas of the configuration and the classes of plugins.
    register_schemas()
    context, task, config, state = cloudpickle.loads(packed)
    sys.argv = ["vlmcap", *config.hydra.overrides.task]  # in place of the arguments of the launcher's process
    # The order of Hydra's own launchers: resolvers first, then the state of Hydra's singletons.
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
