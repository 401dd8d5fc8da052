"""How a run is spread over devices: Lightning's strategy, what it cannot do, and how the model is cut."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from vlmcap.assembly.parts import dtype_of
from vlmcap.config import Config, EncoderTuning, OptimKind, Precision, Quantization, Strategy
from vlmcap.errors import UserError
from vlmcap.training.processes import num_processes, own_command

if TYPE_CHECKING:
    import torch
    from lightning.pytorch.strategies import Strategy as LightningStrategy
    from torch import nn
    from torch.distributed.device_mesh import DeviceMesh


def check_strategy(config: Config) -> None:
    """`UserError` for devices that are not there, and for what the strategy cannot do."""
    import torch

    chosen, devices = config.trainer.strategy, config.hardware.devices
    if config.hardware.accelerator != "cpu" and torch.cuda.is_available() and devices > torch.cuda.device_count():
        raise UserError(f"hardware.devices={devices}, but this machine has {torch.cuda.device_count()}; lower it to that")
    if chosen is Strategy.deepspeed:
        raise UserError(
            "trainer=deepspeed only composes: gradients are scaled by the label tokens of all devices, and ZeRO's lie in pieces by then; "
            "set trainer=fsdp2, or ddp"
        )
    if chosen is Strategy.fsdp2:
        _check_fsdp2(config)


def _check_fsdp2(config: Config) -> None:
    if config.llm.quantization is not Quantization["none"]:
        raise UserError(
            f"trainer=fsdp2 cuts weights into shards, which llm.quantization={config.llm.quantization.name} packs into blocks of its own; "
            "set llm.quantization=none, or trainer=ddp"
        )
    if config.hardware.precision is Precision.fp16:
        raise UserError("trainer=fsdp2 has no scaler for hardware.precision=fp16; set hardware.precision=bf16 or fp32, or trainer=ddp")
    if config.optim.kind is not OptimKind.adamw:
        raise UserError(
            f"trainer=fsdp2 keeps the optimiser's state in shards, which optim={config.optim.kind.name} cannot; set optim=adamw"
        )
    if config.tuning.use_lora and config.tuning.lora.use_experts:
        raise UserError("trainer=fsdp2 does not cut adapters on experts; set tuning.lora.use_experts=false, or trainer=ddp")
    if config.hardware.offload_checkpoints:
        raise UserError("trainer=fsdp2 was not tried with hardware.offload_checkpoints=true; set it to false")


def make_strategy(config: Config) -> LightningStrategy | str:
    """Lightning's strategy; its own choice for one process."""
    from vlmcap.training.strategies import ShardedStrategy, SharedStrategy

    chosen, command = config.trainer.strategy, own_command(config)
    if chosen is Strategy.fsdp2:
        return ShardedStrategy(command, num_processes(config))
    if num_processes(config) == 1:
        return "auto"
    stages = [stage for stage in config.tuning.stages.values() if stage.epochs]
    is_simple = len(stages) == 1 and config.tuning.encoder is EncoderTuning.none and not config.tuning.lora.use_experts
    return SharedStrategy(command, has_unused=not is_simple)


def make_sharder(config: Config) -> Callable[[nn.Module, DeviceMesh, torch.device], None] | None:
    """What cuts the captioner into shards, or None where it stays whole."""
    if config.trainer.strategy is not Strategy.fsdp2:
        return None
    dtype = None if config.hardware.precision is Precision.fp32 else dtype_of(config.hardware.precision)

    def shard(captioner: nn.Module, mesh: DeviceMesh, device: torch.device) -> None:
        from vlmcap.training.sharding import shard_captioner

        shard_captioner(captioner, mesh, device, dtype)

    return shard


def describe_batch(config: Config) -> str:
    """Clips or tokens of a device's batch, times what makes it the batch of one optimiser step."""
    budget, steps, devices = config.data.max_tokens_per_batch, config.trainer.accumulate_grad_batches, num_processes(config)
    size, unit = (config.data.batch_size, "clips") if budget is None else (budget, "tokens")
    if devices == 1:
        return f"{size} {unit} × {steps}"
    return f"{size} {unit} × {steps} × {devices} devices ({config.trainer.strategy.name}) = {size * steps * devices} {unit} a step"
