"""A job as bytes that another process runs: what Hydra's launchers for other processes send, without a launcher's own ways."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict

from vlmcap.errors import UserError
from vlmcap.program import HYDRA_FOLDER

LOG = "output.log"  # in the folder of the run: what it printed


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
        # main() of train.py travels by value: it is not a module that can be imported elsewhere.
        return cloudpickle.dumps((self._context, self._task, config, Singleton.get_state())), folder


def run_packed(packed: bytes) -> None:
    """Runs a job here; how it ended stands in its `status.json`."""
    import cloudpickle
    from hydra.core.singleton import Singleton
    from hydra.core.utils import run_job, setup_globals

    context, task, config, state = cloudpickle.loads(packed)
    setup_globals()
    Singleton.set_state(state)
    run_job(
        hydra_context=context,
        task_function=task,
        config=config,
        job_dir_key="hydra.sweep.dir",
        job_subdir_key="hydra.sweep.subdir",
    )


def needed(module: str, extra: str) -> Any:
    """A library of an extra.

    Raises:
        UserError: It is not installed.
    """
    from importlib import import_module

    try:
        import_module("cloudpickle")
        return import_module(module)
    except ImportError as error:
        raise UserError(f'launcher={extra} needs {module}: pip install "vlmcap[{"slurm" if extra == "submitit" else extra}]"') from error


def say_ended(folder: Path) -> None:
    """One line for a job that another process ran."""
    from vlmcap.sweeping.job import BEGUN
    from vlmcap.sweeping.status import read_status

    status = read_status(folder)
    word, reason = (status.status, status.reason) if status and status.reason != BEGUN else ("ended without a word", "")
    print(f"Job {folder.name}: {word}{': ' if reason else ''}{reason}", flush=True)
