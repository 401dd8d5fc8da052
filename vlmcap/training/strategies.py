"""Lightning strategies that keep the model on its device, and write checkpoints that any number of processes reads."""

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

from vlmcap.training.sharding import as_sharded_like, gather_full, load_full_weights

_children: list[subprocess.Popen[bytes]] = []  # processes that this one has started, until `end_processes`
# The other processes wait while the first one loads a large model or scores a large split.
_TIMEOUT = timedelta(hours=2)


class JobLauncher(_SubprocessScriptLauncher):
    """Starts the other processes of this machine with a given command.

    Lightning's launcher repeats the command line of the terminal, which would start the whole sweep again with `-m`, in
    other folders.

    Args:
        command: Command of one process; environment variables give its rank.
    """

    def __init__(self, command: Sequence[str], *args: Any) -> None:
        super().__init__(*args)
        self.command = list(command)

    def _call_children_scripts(self) -> None:
        self._check_can_spawn_children()
        environment, count = self.cluster_environment, self.num_processes
        # The variables of torchrun, which the children inherit; each child gets a rank of its own below.
        # `|=` writes into the environment of this process, which joins the group with the same variables.
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
        # Known beyond this launcher, because the processes take part in fit and tests, until `end_processes`.
        _children.extend(self.procs)


class _KeepOnDevice(Strategy):
    """Keeps the model on its device when a fit or a test ends.

    Lightning would copy the full model to the host, frozen weights included, and back again before the next test.
    """

    def teardown(self) -> None:
        """Frees what Lightning frees, except the model."""
        module = self.lightning_module
        # `Strategy.teardown` calls `.cpu()` on the module if it has one.
        self._lightning_module = None  # hides the module from Lightning, which would move it
        try:
            super().teardown()
        finally:
            self._lightning_module = module
        self.model = module  # without the DDP wrapper


class SingleStrategy(_KeepOnDevice, SingleDeviceStrategy):
    """Trains in one process on one device."""


class SharedStrategy(_KeepOnDevice, DDPStrategy):
    """Trains with DDP: every process holds the full model and its own batches, and gradients are averaged.

    Frozen weights, which may be quantised, are neither compared nor sent, because every process reads the same files.

    Args:
        command: Command of one process.
        has_unused: Whether a step may leave trained parameters without a gradient, as a stage that freezes them does.
    """

    def __init__(self, command: Sequence[str], *, has_unused: bool) -> None:
        super().__init__(
            find_unused_parameters=has_unused,
            broadcast_buffers=False,  # they hold constants, which are equal in all processes
            gradient_as_bucket_view=True,
            static_graph=False,
            timeout=_TIMEOUT,
        )
        self.command = command

    def _configure_launcher(self) -> None:
        self._launcher = _launcher(self)

    def configure_ddp(self) -> None:
        """Wraps the module in DDP, which ignores its frozen parameters."""
        assert isinstance(self.model, torch.nn.Module)
        frozen = [name for name, parameter in self.model.named_parameters() if not parameter.requires_grad]
        # At the start DDP broadcasts every parameter that is not in this list, also a frozen one.
        torch.nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self.model, frozen)
        super().configure_ddp()


class ShardedStrategy(ModelParallelStrategy):
    """Trains with FSDP2: every process holds a shard of each weight and its own batches.

    Lightning's checkpoints number the optimiser states by all parameters of the model, and gather all of them. These
    checkpoints hold the full trained weights alone, and the optimiser states in the layout of a single process, so that
    any number of processes can read them.

    Args:
        command: Command of one process.
        num_processes: Number of processes on all machines.
    """

    def __init__(self, command: Sequence[str], num_processes: int) -> None:
        # All processes are data parallel; the tensor parallel size is 1.
        super().__init__(num_processes, 1, save_distributed_checkpoint=False, timeout=_TIMEOUT)
        self.command = command

    def _configure_launcher(self) -> None:
        self._launcher = _launcher(self)

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Whether Lightning restores the optimiser through `load_optimizer_state_dict`: always."""
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Returns the full trained weights; every process must call this method."""
        module: Any = self.lightning_module
        trained = {
            f"captioner.{name}": weight for component in module.trained.values() for name, weight in component.items()
        }
        return {name: gather_full(weight) for name, weight in trained.items()}

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Returns the optimiser state in the layout of a single process; every process must call this method."""
        # Lightning may wrap the optimiser; the torch optimiser is inside.
        plain = getattr(optimizer, "optimizer", optimizer)
        # `state_dict` numbers the parameters by their place in the groups, which is the same in any number of
        # processes.
        full: dict[str, Any] = plain.state_dict()
        return full | {
            "state": {
                index: {
                    name: gather_full(value) if isinstance(value, Tensor) else value for name, value in state.items()
                }
                for index, state in full["state"].items()
            }
        }

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Reads a checkpoint file in every process."""
        content: dict[str, Any] = torch.load(checkpoint_path, map_location="cpu", weights_only=True, mmap=True)
        return content

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Copies the trained weights of a checkpoint into the shards."""
        assert self.lightning_module is not None
        load_full_weights(self.lightning_module, checkpoint["state_dict"])

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Loads the optimiser states, sharded like their weights."""
        # States arrive in full; moments are cut like their weights, and the step counter stays as it is.
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            states = {
                index: {name: _shard_state(value, parameters[int(index)]) for name, value in state.items()}
                for index, state in saved["state"].items()
            }
            optimizer.load_state_dict(saved | {"state": states})


def _shard_state(value: Any, parameter: Tensor) -> Any:
    if isinstance(value, Tensor) and value.shape == parameter.shape and value.ndim:
        return as_sharded_like(value, parameter)
    return value


def _launcher(strategy: Any) -> JobLauncher | None:
    environment = strategy.cluster_environment
    if environment.creates_processes_externally:
        # torchrun or srun has started the others.
        return None
    return JobLauncher(strategy.command, environment, strategy.num_processes, strategy.num_nodes)


def end_processes(*, is_failed: bool) -> None:
    """Waits for the processes that this one started, and resets the process group for the next run of a sweep.

    Args:
        is_failed: Whether this process failed; the others would wait for it forever and are terminated.
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
    # The next job of a sweep opens a group of its own, at another port.
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE"):
        os.environ.pop(name, None)
