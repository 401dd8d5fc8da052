"""The processes of a run: ranks, how the others are started, and how the model is distributed over them."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from vlmcap.assembly.components import autocast_dtype, device_of, uses_expert_adapters
from vlmcap.config import Config, EncoderTuning, Strategy
from vlmcap.locks import claimed_folder
from vlmcap.overrides import quoted

if TYPE_CHECKING:
    import torch
    from lightning.pytorch.strategies import Strategy as LightningStrategy
    from torch import nn
    from torch.distributed.device_mesh import DeviceMesh

# Overrides that `launch_command` replaces.
_REPLACED = ("paths.output_dir=", "hydra.run.dir=", "hydra.output_subdir=", "hydra/job_logging=")


def num_processes(config: Config) -> int:
    """Returns the number of processes on all machines, one per device."""
    return config.hardware.devices * config.trainer.num_nodes


def process_rank(config: Config) -> int:
    """Returns the global rank of this process, 0 to N - 1, as Lightning will find it, before there is a trainer."""
    from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

    if num_processes(config) == 1:
        return 0
    # 1. srun has started every process. With LOCAL_RANK set, Lightning has started this one itself, inside a Slurm job.
    if "LOCAL_RANK" not in os.environ and SLURMEnvironment.detect():
        return int(os.environ["SLURM_PROCID"])
    # 2. torchrun.
    if "RANK" in os.environ and "TORCHELASTIC_RUN_ID" in os.environ:
        return int(os.environ["RANK"])
    # 3. Lightning's own launcher, one per machine; GROUP_RANK is torchrun's name for the rank of a machine.
    node = int(os.environ.get("NODE_RANK", os.environ.get("GROUP_RANK", "0")))
    return node * config.hardware.devices + local_rank()


def local_rank() -> int:
    """Returns the rank of this process on its machine, which is the index of its device."""
    return int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")))


def is_main(config: Config) -> bool:
    """Returns whether this is the process that writes and prints."""
    return process_rank(config) == 0


def receives_weights(config: Config) -> bool:
    """Returns whether this process loads no weights, because it receives its shards from the first process."""
    return config.trainer.strategy is Strategy.fsdp2 and not is_main(config)


def run_folder(config: Config) -> AbstractContextManager[object]:
    """Returns a context in which the run folder is locked; the first process holds the lock for all of them.

    Raises:
        InUseError: Another run writes to the folder.
    """
    folder = Path(config.paths.output_dir)
    return claimed_folder(folder, "paths.output_dir") if is_main(config) else contextlib.nullcontext()


@contextmanager
def as_process(config: Config) -> Iterator[None]:
    """Selects the device of this process inside the context, and silences all processes but the first."""
    from lightning.pytorch.utilities import rank_zero_only

    if num_processes(config) == 1:
        yield
        return
    import torch

    from vlmcap.training.strategies import end_processes

    # Lightning prints and logs by this rank, for which it takes RANK or LOCAL_RANK until there is a trainer.
    rank_zero_only.rank = process_rank(config)  # type: ignore[attr-defined]
    if config.hardware.accelerator != "cpu" and torch.cuda.is_available():
        torch.cuda.set_device(local_rank())
    with contextlib.ExitStack() as stack:
        if not is_main(config):
            nowhere = stack.enter_context(Path(os.devnull).open("w", encoding="utf-8"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
        is_failed = True
        try:
            yield
            is_failed = False
        finally:
            end_processes(is_failed=is_failed)


def launch_command(config: Config) -> list[str]:
    """Returns the command that starts another process of this run; in a sweep, of this job alone."""
    from hydra.core.hydra_config import HydraConfig

    script = _program_command()
    if not HydraConfig.initialized():
        return [*script, *sys.argv[1:]]
    folder = Path(config.paths.output_dir).resolve()
    # `task` holds the overrides of this job, with the one value of each swept key.
    kept = [override for override in HydraConfig.get().overrides.task if not override.startswith(_REPLACED)]
    # All processes share one folder, in which Hydra writes for the first process alone.
    added = [
        f"paths.output_dir={quoted(folder)}",
        f"hydra.run.dir={quoted(folder)}",
        "hydra.output_subdir=null",
        "hydra/job_logging=stdout",
    ]
    return [*script, *kept, *added]


def _program_command() -> list[str]:
    """Returns the command of this program: its script or module, or `vlmcap train`, also for a job of a launcher."""
    from hydra.core.hydra_config import HydraConfig

    import __main__

    spec = getattr(__main__, "__spec__", None)
    # `__spec__` is None for a script or a console entry point, and names the module for `python -m`.
    is_vlmcap = (
        Path(sys.argv[0]).stem == "vlmcap"
        if spec is None
        else spec.name in ("vlmcap.cli.__main__", "vlmcap.sweeping.child")
    )
    if is_vlmcap and HydraConfig.initialized():
        return [sys.executable, "-m", "vlmcap.cli", str(HydraConfig.get().job.config_name)]
    return [sys.executable, os.path.abspath(sys.argv[0])] if spec is None else [sys.executable, "-m", spec.name]


def make_strategy(config: Config) -> LightningStrategy:
    """Builds the Lightning strategy of the trainer."""
    from vlmcap.training.strategies import ShardedStrategy, SharedStrategy, SingleStrategy

    chosen, command = config.trainer.strategy, launch_command(config)
    if chosen is Strategy.fsdp2:
        return ShardedStrategy(command, num_processes(config))
    if num_processes(config) == 1:
        return SingleStrategy(device_of(config))
    # DDP must look for parameters without a gradient if a later stage trains others, if a partly tuned encoder has
    stages = [stage for stage in config.tuning.stages.values() if stage.epochs]
    is_simple = (
        len(stages) == 1 and config.tuning.encoder_tuning is EncoderTuning.none and not uses_expert_adapters(config)
    )
    return SharedStrategy(command, has_unused=not is_simple)


def make_sharder(config: Config) -> Callable[[nn.Module, DeviceMesh, torch.device], None] | None:
    """Returns the function that shards the captioner over all processes, or None if it is not sharded."""
    if config.trainer.strategy is not Strategy.fsdp2:
        return None
    dtype = autocast_dtype(config)

    def shard(captioner: nn.Module, mesh: DeviceMesh, device: torch.device) -> None:
        from vlmcap.training.sharding import shard_captioner

        shard_captioner(captioner, mesh, device, dtype)

    return shard


def describe_batch(config: Config) -> str:
    """Formats the batch of one optimiser step, such as "4 clips × 8": micro-batch × accumulation (× devices)."""
    budget = config.data.max_tokens_per_batch
    steps = config.trainer.accumulate_grad_batches
    devices = num_processes(config)
    size, unit = (config.data.batch_size, "clips") if budget is None else (budget, "tokens")
    if devices == 1:
        return f"{size} {unit} × {steps}"
    total = f"{size * steps * devices} {unit} per step"
    return f"{size} {unit} × {steps} × {devices} devices ({config.trainer.strategy.name}) = {total}"
