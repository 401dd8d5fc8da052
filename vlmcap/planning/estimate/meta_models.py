"""A configuration's encoder, projector and language model at true size, without weights and without a download."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from vlmcap.assembly.components import (
    add_adapters,
    build_meta_encoder,
    dtype_of,
    encoder_options,
    has_plugin_encoder,
    max_patches,
    projector_sizes,
    train_encoder,
)
from vlmcap.config import Config, LlavaNextVideoConfig
from vlmcap.demo.prepare import TINY, TINY_ENCODERS
from vlmcap.demo.tiny_encoders import VISION_CONFIGS
from vlmcap.demo.tiny_llm import LANGUAGE_CONFIG
from vlmcap.errors import UserError
from vlmcap.models.captioner import VideoCaptioner
from vlmcap.models.checkpoint import locate_description
from vlmcap.models.encoders import VisionEncoder, build_encoder
from vlmcap.models.encoders.preprocessing import read_processor
from vlmcap.models.encoders.tower import read_config
from vlmcap.models.hub import HubUnreachableError
from vlmcap.models.known import known_config
from vlmcap.models.llm.attention import REPEATED, register_repeated_keys
from vlmcap.models.pretrained import VlmComponents, build_pretrained
from vlmcap.models.projectors import ProjectorSizes, build_projector
from vlmcap.planning.estimate.fake_tensors import fill_with_fake_tensors, forget_checkpoints, quantize_fake

_DEPTHS = ("depth", "num_hidden_layers")
_OTHER_KINDS = ("fullatt_block_indexes", "deepstack_visual_indexes")  # blocks of a tower that are not like the rest
PROMPT_TOKENS = 32  # of the text around the visual tokens; no tokenizer is there before the download


def architecture(config: Config, part: str) -> dict[str, Any]:
    """The `config.json` of a base: of its folder, packaged for the published names, or fetched alone from the hub.

    Args:
        config: Run configuration.
        part: "encoder", "llm" or "model".

    Raises:
        UserError: There is none to be had.
    """
    checkpoint = getattr(config, part).checkpoint
    if part == "encoder" and has_plugin_encoder(config):  # its settings say all
        return {}
    if part == "llm" and checkpoint == TINY:  # made on first use
        return dict(LANGUAGE_CONFIG)
    if part == "encoder" and checkpoint in TINY_ENCODERS:
        return dict(VISION_CONFIGS[checkpoint])
    folder = _description(config, part)
    return copy.deepcopy(known_config(checkpoint) or {}) if folder is None else read_config(folder)


def processor(config: Config) -> dict[str, Any]:
    """What a checkpoint's image processor says, or nothing where the family's values are used.

    It decides the grid of a rotary encoder.
    """
    is_made = config.encoder.checkpoint in TINY_ENCODERS or has_plugin_encoder(config)
    folder = None if is_made else _description(config, "encoder")
    return {} if folder is None else read_processor(folder)


def _description(config: Config, part: str) -> Path | None:
    """The folder with the configuration files of a base.

    None where the packaged values are used: without a revision, or without a hub.
    """
    settings = getattr(config, part)
    key, is_known = f"{part}.checkpoint", known_config(settings.checkpoint) is not None
    if Path(settings.checkpoint).expanduser().is_dir():
        return locate_description(settings.checkpoint, settings.revision, key=key)
    if is_known and settings.revision is None:
        return None
    try:
        return _fetch(settings.checkpoint, settings.revision, key, settings.gate)
    except HubUnreachableError:
        if is_known:
            return None
        raise


@functools.cache  # the hub is asked once for all readers of a plan
def _fetch(checkpoint: str, revision: str | None, key: str, gate: str | None) -> Path:
    return locate_description(checkpoint, revision, key=key, gate=gate, has_processor=key == "encoder.checkpoint")


def text_values(config: Config) -> dict[str, Any]:
    """The language model's part of the architecture.

    Raises:
        UserError: The installed transformers does not have its class.
    """
    part = "model" if config.is_pretrained_vlm else "llm"
    values = architecture(config, part)
    text = dict(values.get("text_config") or values)
    if text.get("model_type") not in CONFIG_MAPPING:
        raise UserError(
            f"{part}.checkpoint={getattr(config, part).checkpoint} has the model_type {text.get('model_type')!r}, "
            "which the installed "
            f"transformers {transformers.__version__} does not know: update transformers, or choose another checkpoint"
        )
    return text


def text_config(config: Config, depth: int | None = None) -> Any:
    """Transformers' configuration of the language model.

    Args:
        config: Of the run.
        depth: Blocks to leave; None leaves all, and is made once for all that only read it.
    """
    values = text_values(config)
    if depth is None:
        return cached(["text", values], lambda: AutoConfig.for_model(**values).get_text_config())
    text = AutoConfig.for_model(**values).get_text_config()
    text.num_hidden_layers = depth
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:depth]
    return text


def meta_encoder(config: Config, num_blocks: int | None = None) -> VisionEncoder:
    """The vision encoder on the meta device.

    Args:
        config: Of the run.
        num_blocks: Blocks to leave, of a whole model those of the commonest kind; None leaves all in front of
            encoder.feature_layer.
    """
    if config.is_pretrained_vlm:
        encoder: VisionEncoder = meta_vlm(config, 1, num_blocks).encoder
        return encoder
    if has_plugin_encoder(config):
        return build_meta_encoder(config, Path())
    values, options = architecture(config, "encoder"), replace(encoder_options(config), attention="sdpa")
    depth = None
    if num_blocks is not None:
        layer = options.feature_layer
        depth = num_blocks if layer >= 0 else num_blocks - 1 - layer
        options = replace(options, feature_layer=min(layer, num_blocks))
    # Sizes do not depend on how pixels are normalised, which only the checkpoint's processor file may say.
    options = replace(options, mean=options.mean or (0.5, 0.5, 0.5), std=options.std or (0.5, 0.5, 0.5))
    with torch.device("meta"):
        return build_encoder(values, options, processor=processor(config), num_blocks=depth)


def num_blocks(encoder: Any) -> int:
    """Blocks of an encoder's tower."""
    return int(encoder.tower.config.num_hidden_layers)


def plain_vision_blocks(config: Config) -> int | None:
    """Blocks of a whole model's tower without those that differ (full attention among windows, DeepStack).

    None where it does not say.
    """
    vision = architecture(config, "model").get("vision_config") or {}
    total = next((int(vision[key]) for key in _DEPTHS if key in vision), None)
    return None if total is None else total - sum(len(vision.get(key) or ()) for key in _OTHER_KINDS)


def meta_vlm(config: Config, depth: int, plain_vision: int | None = None) -> VlmComponents:
    """A whole model on the meta device.

    Args:
        config: Of the run.
        depth: Blocks of its language model to leave.
        plain_vision: Blocks of its tower to leave beside those that differ, which come first then; None leaves all in
            their places.
    """
    values = architecture(config, "model")
    text = dict(values.get("text_config") or {})
    target = text if text else values
    target["num_hidden_layers"] = depth
    if target.get("layer_types"):
        target["layer_types"] = target["layer_types"][:depth]
    if text:
        values["text_config"] = text
    if plain_vision is not None:
        values["vision_config"] = _cut_vision(values["vision_config"], plain_vision)
    dtype = dtype_of(config.hardware.precision)
    with torch.device("meta"):
        return build_pretrained(config.model.kind, values, dtype=dtype, max_patches=max_patches(config))


def _cut_vision(vision: dict[str, Any], num_plain: int) -> dict[str, Any]:
    others = {key: list(range(len(vision[key]))) for key in _OTHER_KINDS if vision.get(key)}
    depth = next(key for key in _DEPTHS if key in vision)
    return vision | others | {depth: num_plain + sum(map(len, others.values()))}


def cached_meta_encoder(config: Config) -> VisionEncoder:
    """The vision encoder on the meta device at full depth, made once for all that only ask for its sizes."""
    if config.is_pretrained_vlm:
        encoder: VisionEncoder = cached_meta_vlm(config).encoder
        return encoder
    return _cached(config, lambda: meta_encoder(config))  # type: ignore[no-any-return]


def cached_meta_vlm(config: Config) -> VlmComponents:
    """A whole model on the meta device with one block of its language model, made once for all that only ask for its sizes."""
    return _cached(config, lambda: meta_vlm(config, 1))  # type: ignore[no-any-return]


def _cached(config: Config, make: Callable[[], Any]) -> Any:
    part = config.model if config.is_pretrained_vlm else config.encoder
    base = (
        architecture(config, "model")
        if config.is_pretrained_vlm
        else [architecture(config, "encoder"), processor(config)]
    )
    return cached(
        [asdict(part), asdict(config.encoder), config.hardware.precision, config.hardware.attention, base], make
    )


def fake_encoder(config: Config, mode: FakeTensorMode, num_blocks: int | None) -> VisionEncoder:
    """The encoder in fake tensors, as training has it."""
    encoder = meta_encoder(config, num_blocks)
    train_encoder(config, encoder)
    fill_with_fake_tensors(encoder, mode)
    return encoder


def fake_projector(config: Config, sizes: ProjectorSizes | None, mode: FakeTensorMode) -> nn.Module:
    """The projector in fake tensors, trained."""
    with torch.device("meta"):
        projector: nn.Module = (
            meta_vlm(config, 1).projector if sizes is None else build_projector(config.projector, sizes)
        )
    is_trained = any(stage.projector_lr > 0 for stage in config.tuning.stages.values())
    projector.requires_grad_(is_trained)
    fill_with_fake_tensors(projector, mode)
    return projector


def fake_llm(
    config: Config, mode: FakeTensorMode, depth: int, has_flash: bool, num_kept: int = 0
) -> tuple[nn.Module, Callable[..., VideoCaptioner]]:
    """The language model in fake tensors, quantised and with adapters as training has it, and its captioner's class.

    Args:
        config: Of the run.
        mode: Of the fake tensors.
        depth: Blocks to leave.
        has_flash: Of the GPU; without, keys and values are repeated for grouped queries, as `choose_attention` has it.
        num_kept: Last blocks that are not computed again.
    """
    dtype, kept = dtype_of(config.hardware.precision), None
    captioner_class: Callable[..., VideoCaptioner] = VideoCaptioner
    with torch.device("meta"):
        if config.is_pretrained_vlm and not isinstance(config.model, LlavaNextVideoConfig):
            parts = meta_vlm(config, depth)
            llm, captioner_class, kept = parts.llm, parts.captioner_class, {"lm_head"}
        else:
            attention = "sdpa" if has_flash else _repeated_keys()
            llm = AutoModelForCausalLM.from_config(
                text_config(config, depth), dtype=dtype, attn_implementation=attention
            )
        llm.requires_grad_(False)
        quantize_fake(llm, config.llm.quantization.value, dtype, kept)
        adapted = add_adapters(config, llm, num_kept)
    if config.hardware.offload_checkpoints:
        forget_checkpoints(adapted)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.requires_grad_(any(stage.adapter_lr > 0 for stage in config.tuning.stages.values()))
    fill_with_fake_tensors(adapted, mode)
    return adapted, captioner_class


def _repeated_keys() -> str:
    register_repeated_keys()
    return REPEATED


def planned_sizes(config: Config, encoder: Any) -> ProjectorSizes | None:
    """The projector's sizes; None for a whole model's own."""
    if config.is_pretrained_vlm:
        return None
    return projector_sizes(config, encoder, int(text_config(config).hidden_size), PROMPT_TOKENS // 2)


_made: dict[str, Any] = {}


def cached(key: Any, make: Callable[[], Any]) -> Any:
    """What was made of a key's plain data, made at its first use."""
    text = json.dumps(key, sort_keys=True, default=str)
    if text not in _made:
        _made[text] = make()
    return _made[text]
