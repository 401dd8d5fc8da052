"""Which of a run's processes this is, and how the others are started."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vlmcap.config import Config, Strategy
from vlmcap.errors import UserError

_OURS = ("paths.output_dir=", "hydra.run.dir=", "hydra.output_subdir=", "hydra/job_logging=")


def num_processes(config: Config) -> int:
    """Of all machines, a device each."""
    return config.hardware.devices * config.trainer.num_nodes


def process_rank(config: Config) -> int:
    """Number of this process among all, 0 to N - 1, as Lightning will find it; known before there is a trainer."""
    from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

    if num_processes(config) == 1:
        return 0
    if "LOCAL_RANK" not in os.environ and SLURMEnvironment.detect():
        return int(os.environ["SLURM_PROCID"])
    if "RANK" in os.environ and "TORCHELASTIC_RUN_ID" in os.environ:
        return int(os.environ["RANK"])
    node = int(os.environ.get("NODE_RANK", os.environ.get("GROUP_RANK", "0")))
    return node * config.hardware.devices + local_rank()


def local_rank() -> int:
    """Number of this process on its machine, which is that of its device."""
    return int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")))


def is_main(config: Config) -> bool:
    """Whether this process writes and prints."""
    return process_rank(config) == 0


def is_hollow(config: Config) -> bool:
    """Whether this process needs no weights of its own: it gets its shards of the first one's."""
    return config.trainer.strategy is Strategy.fsdp2 and not is_main(config)


@contextmanager
def as_process(config: Config) -> Iterator[None]:
    """Inside, this process uses its own device, and only the first one prints."""
    from lightning.pytorch.utilities import rank_zero_only

    if num_processes(config) == 1:
        yield
        return
    import torch

    from vlmcap.training.strategies import end_processes

    rank_zero_only.rank = process_rank(config)  # type: ignore[attr-defined]
    if config.hardware.accelerator != "cpu" and torch.cuda.is_available():
        torch.cuda.set_device(local_rank())
    with contextlib.ExitStack() as stack:
        if not is_main(config):
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(Path(os.devnull).open("w", encoding="utf-8"))))
        is_failed = True
        try:
            yield
            is_failed = False
        finally:
            end_processes(is_failed=is_failed)


def check_launch(config: Config) -> None:
    """`UserError` where processes that torchrun or Slurm started would name different folders, or run a sweep."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    is_ours = "LOCAL_RANK" in os.environ and not {"TORCHELASTIC_RUN_ID", "SLURM_PROCID"} & os.environ.keys()
    if num_processes(config) == 1 or is_ours or not HydraConfig.initialized() or not _is_started_elsewhere():
        return
    hydra: Any = HydraConfig.get()
    if hydra.mode is RunMode.MULTIRUN:
        raise UserError("torchrun and srun start one run, and -m starts many; leave -m out, or start the sweep without them")
    given = [*hydra.overrides.task, *hydra.overrides.hydra]
    if not any(override.startswith(("paths.output_dir=", "hydra.run.dir=")) for override in given):
        raise UserError("processes that torchrun or srun started would each name their folder by the clock; set paths.output_dir")


def _is_started_elsewhere() -> bool:
    from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

    return "TORCHELASTIC_RUN_ID" in os.environ or SLURMEnvironment.detect()


def own_command(config: Config) -> list[str]:
    """The command that starts another process of this very run: of a sweep, of this job alone."""
    from hydra.core.hydra_config import HydraConfig

    import __main__

    spec = getattr(__main__, "__spec__", None)
    script = [sys.executable, "-m", spec.name] if spec is not None else [sys.executable, os.path.abspath(sys.argv[0])]
    if not HydraConfig.initialized():
        return [*script, *sys.argv[1:]]
    folder = Path(config.paths.output_dir).resolve()
    kept = [override for override in HydraConfig.get().overrides.task if not override.startswith(_OURS)]
    # One folder for all, in which Hydra writes for the first process alone.
    own = [
        f"paths.output_dir={_quoted(folder)}",
        f"hydra.run.dir={_quoted(folder)}",
        "hydra.output_subdir=null",
        "hydra/job_logging=stdout",
    ]
    return [*script, *kept, *own]


def _quoted(path: Path) -> str:
    return "'" + str(path).replace("\\", "\\\\").replace("'", "\\'") + "'"
