"""Which of a run's processes this is, how the others are started, and how the model is spread over them."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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


def receives_weights(config: Config) -> bool:
    """Whether this process needs no weights of its own: it gets its shards of the first one's."""
    return config.trainer.strategy is Strategy.fsdp2 and not is_main(config)


@contextmanager
def run_folder(config: Config) -> Iterator[None]:
    """Inside, the folder of the run is this run's alone; its first process holds it for all of them.

    Raises:
        InUseError: Another run writes to it.
    """
    with (
        claimed_folder(Path(config.paths.output_dir), "paths.output_dir")
        if is_main(config)
        else contextlib.nullcontext()
    ):
        yield


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
            stack.enter_context(
                contextlib.redirect_stdout(stack.enter_context(Path(os.devnull).open("w", encoding="utf-8")))
            )
        is_failed = True
        try:
            yield
            is_failed = False
        finally:
            end_processes(is_failed=is_failed)


def launch_command(config: Config) -> list[str]:
    """The command that starts another process of this very run: of a sweep, of this job alone."""
    from hydra.core.hydra_config import HydraConfig

    script = _program()
    if not HydraConfig.initialized():
        return [*script, *sys.argv[1:]]
    folder = Path(config.paths.output_dir).resolve()
    kept = [override for override in HydraConfig.get().overrides.task if not override.startswith(_OURS)]
    # One folder for all, in which Hydra writes for the first process alone.
    own = [
        f"paths.output_dir={quoted(folder)}",
        f"hydra.run.dir={quoted(folder)}",
        "hydra.output_subdir=null",
        "hydra/job_logging=stdout",
    ]
    return [*script, *kept, *own]


def _program() -> list[str]:
    """What starts this program again: its script or module, or `vlmcap train`, of which a launcher's job is one too."""
    from hydra.core.hydra_config import HydraConfig

    import __main__

    spec = getattr(__main__, "__spec__", None)
    is_ours = (
        Path(sys.argv[0]).stem == "vlmcap"
        if spec is None
        else spec.name in ("vlmcap.cli.__main__", "vlmcap.sweeping.child")
    )
    if is_ours and HydraConfig.initialized():
        return [sys.executable, "-m", "vlmcap.cli", str(HydraConfig.get().job.config_name)]
    return [sys.executable, os.path.abspath(sys.argv[0])] if spec is None else [sys.executable, "-m", spec.name]


def make_strategy(config: Config) -> LightningStrategy:
    """The strategy of the trainer."""
    from vlmcap.training.strategies import ShardedStrategy, SharedStrategy, SingleStrategy

    chosen, command = config.trainer.strategy, launch_command(config)
    if chosen is Strategy.fsdp2:
        return ShardedStrategy(command, num_processes(config))
    if num_processes(config) == 1:
        return SingleStrategy(device_of(config))
    stages = [stage for stage in config.tuning.stages.values() if stage.epochs]
    is_simple = (
        len(stages) == 1 and config.tuning.encoder_tuning is EncoderTuning.none and not uses_expert_adapters(config)
    )
    return SharedStrategy(command, has_unused=not is_simple)


def make_sharder(config: Config) -> Callable[[nn.Module, DeviceMesh, torch.device], None] | None:
    """What cuts the captioner into shards, or None where it stays whole."""
    if config.trainer.strategy is not Strategy.fsdp2:
        return None
    dtype = autocast_dtype(config)

    def shard(captioner: nn.Module, mesh: DeviceMesh, device: torch.device) -> None:
        from vlmcap.training.sharding import shard_captioner

        shard_captioner(captioner, mesh, device, dtype)

    return shard


def describe_batch(config: Config) -> str:
    """Clips or tokens of a device's batch, times what makes it the batch of one optimiser step."""
    budget, steps, devices = (
        config.data.max_tokens_per_batch,
        config.trainer.accumulate_grad_batches,
        num_processes(config),
    )
    size, unit = (config.data.batch_size, "clips") if budget is None else (budget, "tokens")
    if devices == 1:
        return f"{size} {unit} × {steps}"
    return f"{size} {unit} × {steps} × {devices} devices ({config.trainer.strategy.name}) = {size * steps * devices} {unit} a step"
