"""A configuration's encoder, projector and language model at true size, without weights or a download."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from vlmcap.assembly.base_checkpoints import encoder_configs, has_plugin_encoder
from vlmcap.assembly.components import (
    add_adapters,
    dtype_of,
    encoder_options,
    load_encoder,
    max_patches,
    projector_sizes,
    train_encoder,
)
from vlmcap.config import Config, MropeVlmConfig
from vlmcap.demo.prepare import TINY, TINY_ENCODERS
from vlmcap.demo.tiny_encoders import VISION_CONFIGS
from vlmcap.demo.tiny_llm import LANGUAGE_CONFIG
from vlmcap.errors import UserError
from vlmcap.models.captioner import VideoCaptioner
from vlmcap.models.checkpoint import locate_description
from vlmcap.models.encoders import VisionEncoder, build_encoder
from vlmcap.models.encoders.joined import JoinedEncoder
from vlmcap.models.encoders.preprocessing import read_processor
from vlmcap.models.encoders.tower import read_config
from vlmcap.models.hub import HubUnreachableError
from vlmcap.models.known import known_config
from vlmcap.models.llm.attention import REPEATED, register_repeated_keys
from vlmcap.models.pretrained import VlmComponents, build_pretrained
from vlmcap.models.projectors import ProjectorSizes, build_projector
from vlmcap.planning.estimate.fake_tensors import emulate_checkpoint_offload, fill_with_fake_tensors, quantize_fake

_DEPTH_KEYS = ("depth", "num_hidden_layers")
_SPECIAL_BLOCKS = ("fullatt_block_indexes", "deepstack_visual_indexes")  # keys of tower blocks that differ
PROMPT_TOKENS = 32  # assumed text tokens around the visual ones, as there is no tokenizer before the download


def architecture(config: Config, component: str) -> dict[str, Any]:
    """Returns the `config.json` of a base checkpoint: from its folder, from this package, or downloaded alone.

    Args:
        config: Run configuration.
        component: "encoder", "llm" or "model".

    Raises:
        UserError: It is not available.
    """
    checkpoint = getattr(config, component).checkpoint
    if component == "encoder" and has_plugin_encoder(config):  # its settings decide everything
        return {}
    if component == "llm" and checkpoint == TINY:  # the demo makes it on first use
        return dict(LANGUAGE_CONFIG)
    if component == "encoder" and checkpoint in TINY_ENCODERS:
        return dict(VISION_CONFIGS[checkpoint])
    folder = _config_folder(config, component)
    return copy.deepcopy(known_config(checkpoint) or {}) if folder is None else read_config(folder)


def processor(config: Config) -> dict[str, Any]:
    """Returns the settings of a checkpoint's image processor; empty where the family's defaults are used.

    They decide the grid of a rotary encoder.
    """
    is_made = config.encoder.checkpoint in TINY_ENCODERS or has_plugin_encoder(config)
    folder = None if is_made else _config_folder(config, "encoder")
    return {} if folder is None else read_processor(folder)


def _config_folder(config: Config, component: str) -> Path | None:
    """Returns the folder with the configuration files of a base checkpoint.

    None where the packaged values are used: without a revision, or without access to the hub.
    """
    settings = getattr(config, component)
    key, is_known = f"{component}.checkpoint", known_config(settings.checkpoint) is not None
    if Path(settings.checkpoint).expanduser().is_dir():
        return locate_description(settings.checkpoint, settings.revision, key=key)
    if is_known and settings.revision is None:
        return None
    try:
        return _fetch_config(settings.checkpoint, settings.revision, key, settings.gate)
    except HubUnreachableError:
        if is_known:
            return None
        raise


@functools.cache  # one request per plan
def _fetch_config(checkpoint: str, revision: str | None, key: str, gate: str | None) -> Path:
    return locate_description(checkpoint, revision, key=key, gate=gate, has_processor=key == "encoder.checkpoint")


def text_values(config: Config) -> dict[str, Any]:
    """Returns the language model's section of the `config.json`.

    Raises:
        UserError: The installed transformers does not have its class.
    """
    component = "model" if config.is_pretrained_vlm else "llm"
    values = architecture(config, component)
    text = dict(values.get("text_config") or values)
    if text.get("model_type") not in CONFIG_MAPPING:
        checkpoint = getattr(config, component).checkpoint
        raise UserError(
            f"{component}.checkpoint={checkpoint} has the model_type {text.get('model_type')!r}, "
            f"which the installed transformers {transformers.__version__} does not know; "
            "update transformers, or choose another checkpoint"
        )
    return text


def text_config(config: Config, depth: int | None = None) -> Any:
    """Returns transformers' configuration of the language model.

    Args:
        config: Run configuration.
        depth: Number of blocks; None takes all, and returns one shared object that must not be changed.
    """
    values = text_values(config)
    if depth is None:
        return cached(["text", values], lambda: AutoConfig.for_model(**values).get_text_config())
    text = AutoConfig.for_model(**values).get_text_config()
    text.num_hidden_layers = depth
    if getattr(text, "layer_types", None):
        text.layer_types = _layer_types(text.layer_types, depth)
    return text


def _layer_types(types: Sequence[str], depth: int) -> list[str]:
    """Returns the types of a model's first blocks, or of its last ones if the first have no keys and values at all."""
    first = list(types[:depth])
    # Layers of linear attention alone have no keys and values, which the plan must know.
    return list(types[-depth:]) if set(first) == {"linear_attention"} else first


def meta_encoder(config: Config, num_blocks: int | None = None) -> VisionEncoder:
    """Builds the vision encoder on the meta device.

    Args:
        config: Run configuration.
        num_blocks: Number of blocks, for a pretrained VLM of its most frequent kind; None takes all in front of
            encoder.feature_layer.
    """
    if config.is_pretrained_vlm:
        encoder: VisionEncoder = meta_vlm(config, 1, num_blocks).encoder
        return encoder
    if has_plugin_encoder(config):
        return load_encoder(config, {}, is_meta=True)
    if len(configs := encoder_configs(config)) > 1:
        joined: Any = JoinedEncoder(*map(meta_encoder, configs))
        return cast(VisionEncoder, joined)
    values, options = architecture(config, "encoder"), replace(encoder_options(config), attention="sdpa")
    depth = None
    if num_blocks is not None:
        layer = options.feature_layer
        # A negative layer counts from the end, so the blocks behind it have to exist too.
        depth = num_blocks if layer >= 0 else num_blocks - 1 - layer
        options = replace(options, feature_layer=min(layer, num_blocks))
    # Sizes do not depend on the normalisation of pixels, which may be stated only in the checkpoint's processor file.
    options = replace(options, mean=options.mean or (0.5, 0.5, 0.5), std=options.std or (0.5, 0.5, 0.5))
    with torch.device("meta"):
        return build_encoder(values, options, processor=processor(config), num_blocks=depth)


def num_blocks(encoder: Any) -> int:
    """Returns the number of blocks of an encoder's tower; 0 where they differ, as in stages or in two towers."""
    if isinstance(encoder, JoinedEncoder):
        return 0
    config = encoder.tower.config
    return 0 if getattr(config, "depths", None) else int(config.num_hidden_layers)


def plain_vision_blocks(config: Config) -> int | None:
    """Returns the blocks of a pretrained VLM's tower without special ones (full attention among windows, DeepStack).

    None where the `config.json` does not state it.
    """
    vision = architecture(config, "model").get("vision_config") or {}
    total = next((int(vision[key]) for key in _DEPTH_KEYS if key in vision), None)
    return None if total is None else total - sum(len(vision.get(key) or ()) for key in _SPECIAL_BLOCKS)


def meta_vlm(config: Config, depth: int, plain_vision: int | None = None) -> VlmComponents:
    """Builds a pretrained VLM on the meta device.

    Args:
        config: Run configuration.
        depth: Blocks of its language model.
        plain_vision: Plain blocks of its tower beside the special ones, which then come first; None takes all blocks in
            their order.
    """
    values = architecture(config, "model")
    text = dict(values.get("text_config") or {})
    target = text if text else values
    target["num_hidden_layers"] = depth
    if target.get("layer_types"):
        target["layer_types"] = _layer_types(target["layer_types"], depth)
    if text:
        values["text_config"] = text
    if plain_vision is not None:
        values["vision_config"] = _truncate_vision(values["vision_config"], plain_vision)
    dtype = dtype_of(config.hardware.precision)
    return build_pretrained(values, dtype=dtype, max_patches=max_patches(config))


def _truncate_vision(vision: dict[str, Any], num_plain: int) -> dict[str, Any]:
    # Special blocks come first in the shortened tower.
    others = {key: list(range(len(vision[key]))) for key in _SPECIAL_BLOCKS if vision.get(key)}
    depth = next(key for key in _DEPTH_KEYS if key in vision)
    return vision | others | {depth: num_plain + sum(map(len, others.values()))}


def cached_meta_encoder(config: Config) -> VisionEncoder:
    """Returns the vision encoder on the meta device at full depth, shared by readers of its sizes."""
    if config.is_pretrained_vlm:
        encoder: VisionEncoder = cached_meta_vlm(config).encoder
        return encoder
    return _cached_by_vision(config, lambda: meta_encoder(config))  # type: ignore[no-any-return]


def cached_meta_vlm(config: Config) -> VlmComponents:
    """Returns a pretrained VLM on the meta device with one language model block, shared by readers of its sizes."""
    return _cached_by_vision(config, lambda: meta_vlm(config, 1))  # type: ignore[no-any-return]


def _cached_by_vision(config: Config, make: Callable[[], Any]) -> Any:
    component = config.model if config.is_pretrained_vlm else config.encoder
    base = (
        architecture(config, "model")
        if config.is_pretrained_vlm
        else [architecture(config, "encoder"), processor(config)]
    )
    return cached(
        [asdict(component), asdict(config.encoder), config.hardware.precision, config.hardware.attention, base], make
    )


def fake_encoder(config: Config, mode: FakeTensorMode, num_blocks: int | None) -> VisionEncoder:
    """Builds the encoder with fake tensors, trained as configured."""
    encoder = meta_encoder(config, num_blocks)
    train_encoder(config, encoder)
    fill_with_fake_tensors(encoder, mode)
    return encoder


def fake_projector(config: Config, sizes: ProjectorSizes | None, mode: FakeTensorMode) -> nn.Module:
    """Builds the projector with fake tensors, trained as configured."""
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
    """Builds the language model with fake tensors, quantised and with adapters as in training.

    Args:
        config: Run configuration.
        mode: Mode of the fake tensors.
        depth: Number of blocks.
        has_flash: Whether the GPU has compute capability 8.0; otherwise keys and values are repeated for grouped
            queries, as in `choose_attention`.
        num_kept: Number of last blocks that are not recomputed.

    Returns:
        The language model and the class of its captioner.
    """
    dtype, kept = dtype_of(config.hardware.precision), None
    captioner_class: Callable[..., VideoCaptioner] = VideoCaptioner
    with torch.device("meta"):
        if isinstance(config.model, MropeVlmConfig):
            components = meta_vlm(config, depth)
            llm, captioner_class, kept = components.llm, components.captioner_class, {"lm_head"}
        else:
            attention = "sdpa" if has_flash else _repeated_keys()
            llm = AutoModelForCausalLM.from_config(
                text_config(config, depth), dtype=dtype, attn_implementation=attention
            )
            if config.is_pretrained_vlm:
                captioner_class = cached_meta_vlm(config).captioner_class
        llm.requires_grad_(False)
        quantize_fake(llm, config.llm.quantization.value, dtype, kept)
        adapted = add_adapters(config, llm, num_kept)
    # The plan counts offloaded inputs as host memory.
    if config.hardware.offload_checkpoints:
        emulate_checkpoint_offload(adapted)
    # Gradients and optimiser state exist only for adapters that a stage trains.
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.requires_grad_(any(stage.adapter_lr > 0 for stage in config.tuning.stages.values()))
    fill_with_fake_tensors(adapted, mode)
    return adapted, captioner_class


def _repeated_keys() -> str:
    register_repeated_keys()
    return REPEATED


def planned_sizes(config: Config, encoder: Any) -> ProjectorSizes | None:
    """Returns the projector's sizes; None for a pretrained VLM, which has its own projector."""
    if config.is_pretrained_vlm:
        return None
    return projector_sizes(config, encoder, int(text_config(config).hidden_size), PROMPT_TOKENS // 2)


_cache: dict[str, Any] = {}


def cached(key: Any, make: Callable[[], Any]) -> Any:
    """Returns a value that is made on the first use of a key.

    Args:
        key: Plain data that decides on the value.
        make: Makes the value.
    """
    text = json.dumps(key, sort_keys=True, default=str)
    if text not in _cache:
        _cache[text] = make()
    return _cache[text]
