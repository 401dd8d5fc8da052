"""A hash that is equal for configurations whose runs give the same result, by which a sweep finds finished jobs."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict
from typing import Any

from vlmcap.compose import to_plain
from vlmcap.config import (
    Config,
    EncoderTuning,
    EncoderTuningConfig,
    FullConfig,
    LoraTuningConfig,
    ProjectorOnlyConfig,
    Strategy,
    TwoStageConfig,
)
from vlmcap.config.unread import unread_keys
from vlmcap.plugins import plugins_of

# Keys that change the folder, name, output or speed of a run, but not its result.
_WITHOUT_EFFECT = (
    *(f"{group}.name" for group in ("model", "encoder", "projector", "llm", "tuning", "hardware", "data")),
    *(f"{group}.{name}" for group in ("model", "encoder", "llm") for name in ("gate", "license")),
    # Only defaults of other groups, which hold the values that count.
    *(f"hardware.{name}" for name in ("memory_gib", "num_frames", "batch_size", "accumulate_grad_batches")),
    *(f"hardware.{name}" for name in ("image_size", "frame_stack", "quantization")),
    "llm.suggested",
    "encoder.is_cached",
    "paths",
    "logger",
    "sweep",
    "launcher",
    "plan",
    "checkpoint",
    "callbacks.profile",
    "trainer.progress_bar",
    "trainer.requeue",
    "trainer.shrink_on_oom",
    "trainer.log_every_n_steps",
    "trainer.checkpoint_every_n_steps",
    "hardware.num_workers",
    "data.num_workers",
    "cache.max_gib",
)
_NATIVE_TUNINGS = (ProjectorOnlyConfig, FullConfig, LoraTuningConfig, TwoStageConfig)
_PATHS = ("checkpoint", "siglip_checkpoint", "bert_checkpoint", "root", "facts", "synonyms")  # keys that hold paths


def config_hash(config: Config) -> str:
    """Returns 16 hex digits that are equal for configurations whose runs give the same result."""
    plain = to_plain(config)
    without = [*_WITHOUT_EFFECT, *unread_keys(config, that_follow=True)]
    if config.data.is_demo:
        without.append("data.root")  # a folder of the cache
    for path in without:
        # "hardware.num_frames" -> ["hardware"], "num_frames"
        *groups, name = path.split(".")
        node = plain
        for group in groups:
            node = node.get(group, {})
        node.pop(name, None)
    plain |= {"mode": config.monitor_mode, "tuning": _tuning(config, plain["tuning"])}
    # A vision tower only distinguishes "auto"; that of a pretrained VLM uses the attention of the language model.
    plain["hardware"]["attention"] = config.hardware.attention == "auto" and not config.is_pretrained_vlm
    if config.is_pretrained_vlm:  # the checkpoint determines the kind
        plain["model"].pop("kind")
        plain["model"] = {"use_outer_marks": True} | plain["model"]
    if config.trainer.strategy is not Strategy.fsdp2:
        plain["trainer"].pop("strategy", None)  # ddp and auto are equivalent
    if plugins := plugins_of(config):
        plain["plugins"] = plugins
    return hashlib.sha256(json.dumps(_normalized(plain), sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:16]


def _tuning(config: Config, plain: dict[str, Any]) -> dict[str, Any]:
    """Returns what is trained and how, by which one stage of `tuning=two_stage` equals `tuning=lora`."""
    tuning = config.tuning
    if type(tuning) not in _NATIVE_TUNINGS:
        return plain
    stages = {name: asdict(stage) for name, stage in tuning.stages.items() if stage.epochs}
    values: dict[str, Any] = {"stages": stages, "encoder": tuning.encoder_tuning.name}
    is_adapted = tuning.encoder_tuning is EncoderTuning.lora or any(
        stage["adapter_lr"] > 0 for stage in stages.values()
    )
    if is_adapted and isinstance(tuning, EncoderTuningConfig):
        # The order of the modules has no effect.
        values["lora"] = plain["lora"] | {"target_modules": sorted(tuning.lora.target_modules.split(","))}
    return values


def _normalized(value: Any, name: str = "") -> Any:
    """Normalises a value: 1 for 1.0, null for empty text, and normalised paths."""
    if isinstance(value, dict):
        return {key: _normalized(one, key) for key, one in value.items()}
    if isinstance(value, list):
        return [_normalized(one) for one in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if value == "":
        return None
    is_path = name in _PATHS and isinstance(value, str)
    return value.rstrip("/") if is_path and "://" in value else os.path.normpath(value) if is_path else value
