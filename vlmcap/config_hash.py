"""A hash that is equal for configurations whose runs come to the same: how a sweep knows a job that it has finished."""

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

# What changes where a run writes, what it is called, how it is shown, or how fast it is, but not what comes out.
_WITHOUT_EFFECT = (
    *(f"{group}.name" for group in ("model", "encoder", "projector", "llm", "tuning", "hardware", "data")),
    *(f"{group}.{name}" for group in ("model", "encoder", "llm") for name in ("gate", "license")),
    # Other groups have these values, their own or those of the profile.
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
_OUR_TUNINGS = (ProjectorOnlyConfig, FullConfig, LoraTuningConfig, TwoStageConfig)
_PATHS = ("checkpoint", "siglip_checkpoint", "bert_checkpoint", "root", "facts", "synonyms")  # names of keys


def config_hash(config: Config) -> str:
    """16 hex digits that are equal for configurations whose runs come to the same."""
    plain = to_plain(config)
    without = (*_WITHOUT_EFFECT, *unread_keys(config, that_follow=True))
    for path in (
        *without,
        *(("data.root",) if config.data.is_demo else ()),
    ):  # the demo's root is a folder of the cache
        *groups, name = path.split(".")
        node = plain
        for group in groups:
            node = node.get(group, {})
        node.pop(name, None)
    plain |= {"mode": config.monitor_mode, "tuning": _tuning(config, plain["tuning"])}
    # A vision tower looks for "auto" alone; that of a pretrained VLM has the language model's.
    plain["hardware"]["attention"] = config.hardware.attention == "auto" and not config.is_pretrained_vlm
    if config.is_pretrained_vlm:  # of which class it is, its checkpoint says
        plain["model"].pop("kind")
        plain["model"] = {"use_outer_marks": True} | plain["model"]
    if config.trainer.strategy is not Strategy.fsdp2:
        plain["trainer"].pop("strategy", None)  # of several processes the others share batches
    if plugins := plugins_of(config):
        plain["plugins"] = plugins
    return hashlib.sha256(json.dumps(_same(plain), sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:16]


def _tuning(config: Config, plain: dict[str, Any]) -> dict[str, Any]:
    """What is trained and how: one stage of `tuning=two_stage` is the same as `tuning=lora`."""
    tuning = config.tuning
    if type(tuning) not in _OUR_TUNINGS:
        return plain
    stages = {name: asdict(stage) for name, stage in tuning.stages.items() if stage.epochs}
    found: dict[str, Any] = {"stages": stages, "encoder": tuning.encoder_tuning.name}
    is_adapted = tuning.encoder_tuning is EncoderTuning.lora or any(
        stage["adapter_lr"] > 0 for stage in stages.values()
    )
    if is_adapted and isinstance(tuning, EncoderTuningConfig):
        found["lora"] = plain["lora"] | {"target_modules": sorted(tuning.lora.target_modules.split(","))}
    return found


def _same(value: Any, name: str = "") -> Any:
    """A value in the one form of those that mean the same: 1 for 1.0, null for an empty text, paths without detours."""
    if isinstance(value, dict):
        return {key: _same(one, key) for key, one in value.items()}
    if isinstance(value, list):
        return [_same(one) for one in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if value == "":
        return None
    is_path = name in _PATHS and isinstance(value, str)
    return value.rstrip("/") if is_path and "://" in value else os.path.normpath(value) if is_path else value
