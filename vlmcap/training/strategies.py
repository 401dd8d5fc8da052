"""Lightning's strategies, which leave the model on its device, with checkpoints of many processes that a single one can read."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy, Strategy
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from torch import Tensor
from torch.optim import Optimizer

from vlmcap.training.sharding import as_sharded_like, load_whole_weights, whole

_children: list[subprocess.Popen[bytes]] = []
_PATIENCE = timedelta(
    hours=2
)  # the first process may load a large model, or score a large split, while the others wait


class JobLauncher(_SubprocessScriptLauncher):
    """Starts the other processes of this machine with a command of our own.

    Lightning's takes that of the terminal: within `-m` it would start the whole sweep again, in folders of other names.

    Args:
        command: Of one process; the environment tells it which it is.
    """

    def __init__(self, command: Sequence[str], *args: Any) -> None:
        super().__init__(*args)
        self.command = list(command)

    def _call_children_scripts(self) -> None:
        self._check_can_spawn_children()
        environment, count = self.cluster_environment, self.num_processes
        os.environ |= {
            "MASTER_ADDR": environment.main_address,
            "MASTER_PORT": str(environment.main_port),
            "NODE_RANK": str(environment.node_rank()),
            "LOCAL_RANK": str(environment.local_rank()),
            "WORLD_SIZE": str(count * self.num_nodes),
        }
        self.procs = [
            subprocess.Popen(self.command, env=os.environ | {"LOCAL_RANK": str(rank)}) for rank in range(1, count)
        ]
        _children.extend(self.procs)


class _StaysInPlace(Strategy):
    """Leaves the model on its device when a fit or a test ends.

    Lightning copies all of it to the host, frozen weights included, and back again before the next test.
    """

    def teardown(self) -> None:
        """Frees what Lightning frees, but for the model."""
        module = self.lightning_module
        self._lightning_module = None  # what it does not know, it does not move
        try:
            super().teardown()
        finally:
            self._lightning_module = module
        self.model = module  # without the wrapper of several processes


class SingleStrategy(_StaysInPlace, SingleDeviceStrategy):
    """One process on one device."""


class SharedStrategy(_StaysInPlace, DDPStrategy):
    """Every process has the whole model and its own batches; gradients are averaged.

    Frozen weights, which may be quantised, are neither compared nor sent: each process has read the same files.

    Args:
        command: Of one process.
        has_unused: Whether a step may leave trained parameters without a gradient, as frozen stages do.
    """

    def __init__(self, command: Sequence[str], *, has_unused: bool) -> None:
        super().__init__(
            find_unused_parameters=has_unused,
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
            static_graph=False,
            timeout=_PATIENCE,
        )
        self.command = command

    def _configure_launcher(self) -> None:
        self._launcher = _launcher(self)

    def configure_ddp(self) -> None:
        """Wraps the module."""
        assert isinstance(self.model, torch.nn.Module)
        frozen = [name for name, parameter in self.model.named_parameters() if not parameter.requires_grad]
        torch.nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self.model, frozen)
        super().configure_ddp()


class ShardedStrategy(ModelParallelStrategy):
    """Every process has a part of each weight (FSDP2) and its own batches.

    Lightning's own checkpoints number the optimiser's states by all parameters of the model, and gather all of them.
    Ours hold the trained weights only, whole, and the optimiser's states as a single process has them, so that any
    number of processes reads them.

    Args:
        command: Of one process.
        num_processes: Of all machines.
    """

    def __init__(self, command: Sequence[str], num_processes: int) -> None:
        super().__init__(num_processes, 1, save_distributed_checkpoint=False, timeout=_PATIENCE)
        self.command = command

    def _configure_launcher(self) -> None:
        self._launcher = _launcher(self)

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Through `load_optimizer_state_dict`."""
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The trained weights, whole; every process must ask for them."""
        module: Any = self.lightning_module
        trained = {f"captioner.{name}": weight for part in module.trained.values() for name, weight in part.items()}
        return {name: whole(weight) for name, weight in trained.items()}

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The state as a single process has it; every process must ask for it."""
        plain = getattr(optimizer, "optimizer", optimizer)
        found: dict[str, Any] = plain.state_dict()
        return found | {
            "state": {
                index: {name: whole(value) if isinstance(value, Tensor) else value for name, value in state.items()}
                for index, state in found["state"].items()
            }
        }

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """The content of a file, for every process."""
        content: dict[str, Any] = torch.load(checkpoint_path, map_location="cpu", weights_only=True, mmap=True)
        return content

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Puts the trained weights of a checkpoint into the shards."""
        assert self.lightning_module is not None
        load_whole_weights(self.lightning_module, checkpoint["state_dict"])

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Puts the optimiser's states into shards like those of their weights."""
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            states = {
                index: {name: _fitted(value, parameters[int(index)]) for name, value in state.items()}
                for index, state in saved["state"].items()
            }
            optimizer.load_state_dict(saved | {"state": states})


def _fitted(value: Any, parameter: Tensor) -> Any:
    return (
        as_sharded_like(value, parameter)
        if isinstance(value, Tensor) and value.shape == parameter.shape and value.ndim
        else value
    )


def _launcher(strategy: Any) -> JobLauncher | None:
    environment = strategy.cluster_environment
    if environment.creates_processes_externally:
        return None
    return JobLauncher(strategy.command, environment, strategy.num_processes, strategy.num_nodes)


def end_processes(*, is_failed: bool) -> None:
    """Waits for the processes that this one started, and makes it as it was before: a sweep goes on with another run.

    Args:
        is_failed: Whether this process stopped early, so that the others would wait for it.
    """
    if not _children:
        return
    for process in _children:
        if is_failed:
            process.terminate()
        try:
            process.wait(10 if is_failed else 120)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    _children.clear()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE"):
        os.environ.pop(name, None)
