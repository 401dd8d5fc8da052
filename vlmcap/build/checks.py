"""Checks of a run that need to know what training measures."""

from __future__ import annotations

from vlmcap.config import Config, EncoderTuning
from vlmcap.errors import UserError


def check_stages(config: Config) -> None:
    """`UserError` unless some stage trains something that there is."""
    stages = [stage for stage in config.tuning.stages.values() if stage.epochs]
    if not stages:
        raise UserError(f"tuning={config.tuning.name} has no epoch to train; set tuning.stages.<name>.epochs")
    tuned = config.tuning.encoder
    if tuned is not EncoderTuning.none and not any(stage.encoder_lr > 0 for stage in stages):
        raise UserError(
            f"tuning.encoder={tuned.name}, but no stage of tuning={config.tuning.name} trains the encoder; "
            "set tuning.stages.<name>.encoder_lr, or tuning.encoder=none"
        )
    if not config.tuning.use_lora and any(stage.adapter_lr > 0 for stage in stages):
        raise UserError("tuning.stages gives the adapters a learning rate, but tuning.use_lora=false; set it to true, or adapter_lr to 0")


def check_objective(config: Config) -> None:
    """`UserError` unless the metrics that are followed will be measured."""
    from vlmcap.training.evaluation import LOOP_METRICS

    known = ("loss", *LOOP_METRICS)
    for key, metric, splits in (("objective", config.objective, ("val", "test")), ("data.monitor", config.data.monitor, ("val",))):
        split, _, name = metric.partition("/")
        if split not in splits or not (name in known or name.startswith(("facts/", "swapped/"))):
            there = "/ or ".join(splits)
            raise UserError(f"{key}={metric} is not measured; choose {there}/ and one of {', '.join(known)}, facts/<fact>")
    if config.objective_mode not in ("min", "max"):
        raise UserError(f"objective_mode={config.objective_mode} must be min or max")
