"""Builds a configuration's captioner with random weights, at true size or truncated to few blocks.

Classes, number formats, adapters and attention are those of `assemble`, but nothing is downloaded and no copy of the
weights is made in host memory. As values are random, captions are meaningless.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from bitsandbytes.nn import Int8Params, Params4bit
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.integrations.bitsandbytes import replace_with_bnb_linear
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.quantizers.base import get_keys_to_not_convert

from vlmcap.assembly.base_checkpoints import encoder_configs, has_plugin_encoder
from vlmcap.assembly.components import (
    add_adapters,
    compile_blocks,
    device_of,
    language_options,
    loss_chunk_bytes,
    tower_attention,
    train_encoder,
)
from vlmcap.assembly.model import generation_settings
from vlmcap.config import Config, MropeVlmConfig, PretrainedVlmConfig, TowerConfig
from vlmcap.errors import UserError
from vlmcap.models.captioner import VideoCaptioner
from vlmcap.models.llm.attention import choose_attention
from vlmcap.models.llm.experts import FusedExperts, pack_experts, replace_experts
from vlmcap.models.llm.load import quantization_config
from vlmcap.models.projectors import build_projector, check_projector
from vlmcap.planning.estimate.meta_models import (
    PROMPT_TOKENS,
    architecture,
    meta_encoder,
    meta_vlm,
    planned_sizes,
    processor,
    text_config,
)

_WEIGHT_STD = 0.02  # of random weights, as in transformers
_PIXEL_MEAN = 127.0  # mean and standard deviation of pixels, as the encoder's own are in its checkpoint


def with_blocks(config: Config, num_blocks: int, folder: Path) -> Config:
    """Truncates the base checkpoints of a configuration to few blocks.

    Args:
        config: Run configuration.
        num_blocks: Most blocks of encoder and language model.
        folder: Folder for the `config.json`s of the truncated checkpoints, and for their memory profiles.
    """
    paths = dataclasses.replace(config.paths, cache_dir=str(folder / "cache"))
    config = dataclasses.replace(config, paths=paths)
    if isinstance(config.model, PretrainedVlmConfig):
        values = architecture(config, "model")
        text = values.get("text_config") or values
        _truncate(text, num_blocks)
        layer = values.get("vision_feature_layer", -1)  # of LLaVA
        _truncate(values.get("vision_config") or {}, _total_blocks(num_blocks, layer if isinstance(layer, int) else -1))
        model = dataclasses.replace(config.model, checkpoint=_write(folder / "model", values))
        return dataclasses.replace(config, model=model)
    if len(encoder_configs(config)) > 1:
        raise UserError(f"encoder={config.encoder.name} joins two encoders; measure one of them with encoder=NAME")
    # The blocks of the language model, then those of the encoder and the layer that is read from it.
    text = architecture(config, "llm")
    _truncate(text.get("text_config") or text, num_blocks)
    vision = architecture(config, "encoder")
    assert isinstance(config.encoder, TowerConfig)
    layer = config.encoder.feature_layer
    _truncate(vision.get("vision_config") or vision, _total_blocks(num_blocks, layer))
    checkpoint = _write(folder / "encoder", vision)
    (folder / "encoder" / "preprocessor_config.json").write_text(json.dumps(processor(config)), encoding="utf-8")
    layer = min(layer, num_blocks) if layer >= 0 else layer
    encoder = dataclasses.replace(config.encoder, checkpoint=checkpoint, feature_layer=layer)
    llm = dataclasses.replace(config.llm, checkpoint=_write(folder / "llm", text))
    return dataclasses.replace(config, encoder=encoder, llm=llm)


def _total_blocks(num_blocks: int, layer: int) -> int:
    """Returns the blocks of a tower of which `num_blocks` run: those after a layer counted from the end do not."""
    return num_blocks if layer >= 0 else num_blocks - 1 - layer


def _truncate(values: dict[str, Any], num_blocks: int) -> None:
    """Truncates a section of a `config.json` in place.

    Qwen's towers call the number of blocks depth, and list layers that give features.
    """
    # "depth" is Qwen-VL's name for the blocks of its tower.
    for key in ("num_hidden_layers", "depth"):
        if key in values:
            values[key] = min(int(values[key]), num_blocks)
    if values.get("layer_types"):
        values["layer_types"] = values["layer_types"][:num_blocks]
    if values.get("deepstack_visual_indexes"):
        values["deepstack_visual_indexes"] = [*range(min(num_blocks, len(values["deepstack_visual_indexes"])))]


def _write(folder: Path, values: dict[str, Any]) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values), encoding="utf-8")
    return str(folder)


def random_captioner(
    config: Config, *, has_encoder: bool, num_kept_layers: int = 0, report: Callable[[str], None]
) -> VideoCaptioner:
    """Builds the captioner of a configuration, with components trained as configured.

    Args:
        config: Run configuration.
        has_encoder: False where features come from disk.
        num_kept_layers: Last layers that are not recomputed although the language model is checkpointed.
        report: Receives what is being created.

    Raises:
        UserError: The components do not fit together, an architecture is not known, or the device is not there.
    """
    device = device_of(config)
    torch.manual_seed(config.seed)
    # 1. Encoder and projector, on the meta device first, which needs no memory.
    encoder_on_meta = meta_encoder(config)
    sizes = planned_sizes(config, encoder_on_meta)
    if sizes is not None:
        check_projector(config.projector, sizes)
    encoder = None
    if has_encoder:
        report(f"encoder ({_size_text(encoder_on_meta)})")
        encoder = fill_random(encoder_on_meta, device)
        _set_attention(config, encoder)
        train_encoder(config, encoder)
    with torch.device("meta"):
        projector: Any = meta_vlm(config, 1).projector if sizes is None else build_projector(config.projector, sizes)
    report(f"projector ({_size_text(projector)})")
    projector = fill_random(projector, device)
    projector.requires_grad_(any(stage.projector_lr > 0 for stage in config.tuning.stages.values()))
    # 2. The captioner and its language model, which some pretrained VLMs have classes of their own for.
    captioner_class: Callable[..., VideoCaptioner] = VideoCaptioner
    if config.is_pretrained_vlm:
        captioner_class = meta_vlm(config, 1).captioner_class
    llm = add_adapters(config, random_llm(config, device, report), num_kept_layers)
    compile_blocks(config, llm)
    captioner = captioner_class(
        encoder, projector, llm, _prompt(config), generation_settings(config), loss_chunk_bytes=loss_chunk_bytes(config)
    )
    return captioner.to(device)


def random_llm(config: Config, device: str, report: Callable[[str], None]) -> nn.Module:
    """Builds the language model, quantised as configured.

    Args:
        config: Run configuration.
        device: Device that it is created on.
        report: Receives what is being created.
    """
    options, text = language_options(config), text_config(config)
    dtype, kept = options["dtype"], None
    llm: Any
    with torch.device("meta"):
        if isinstance(config.model, MropeVlmConfig):
            llm, kept = meta_vlm(config, int(text.num_hidden_layers)).llm, ["lm_head"]
            llm.set_attn_implementation(choose_attention(options["attention"], device, dtype, type(llm)))
        else:
            attention = choose_attention(options["attention"], device, dtype, MODEL_FOR_CAUSAL_LM_MAPPING[type(text)])
            llm = AutoModelForCausalLM.from_config(text, dtype=dtype, attn_implementation=attention)
    report(f"language model ({_size_text(llm)}, {options['quantization']} quantisation)")
    quantize_meta(llm, options["quantization"], dtype, kept)
    filled: nn.Module = fill_random(llm.requires_grad_(False).eval(), device, dtype)
    return filled


def quantize_meta(llm: Any, quantization: str, dtype: torch.dtype, kept: list[str] | None = None) -> None:
    """Replaces linear layers and experts of a meta model by those of bitsandbytes, as loading does.

    Args:
        llm: Model on the meta device, changed in place.
        quantization: "none", "8bit" or "4bit".
        dtype: Data type of the arithmetic.
        kept: Names of layers that are not quantised; None takes transformers' default (the head).
    """
    if quantization == "none":
        return
    if quantization == "4bit":
        replace_experts(llm, to_pack=True)
    keys = get_keys_to_not_convert(llm) if kept is None else kept
    replace_with_bnb_linear(
        llm, modules_to_not_convert=keys, quantization_config=quantization_config(quantization, dtype)
    )
    setattr(llm, f"is_loaded_in_{quantization}", True)  # peft reads it


@torch.no_grad()
def fill_random(module: Any, device: str, dtype: torch.dtype | None = None) -> Any:
    """Replaces meta tensors by random weights; shared tensors stay shared.

    Weights of norms are 1 and vectors 0; tables such as rotary frequencies are computed by transformers; packed weights
    are quantised one by one.

    Args:
        module: Module on the meta device, changed in place.
        device: Device that the weights are created on.
        dtype: Data type of packed weights before they are packed.
    """
    filled: dict[int, Any] = {}  # by the id of the meta tensor, so that shared tensors stay shared
    # The private dictionaries also hold buffers that are not saved, and can be assigned to in place.
    for child in module.modules():
        for tensors in (child._parameters, child._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and tensor.is_meta:
                    if id(tensor) not in filled:
                        filled[id(tensor)] = _random_like(child, name, tensor, device, dtype)
                    tensors[name] = filled[id(tensor)]
        # Zeros as the deviation would make every pixel infinite.
        if isinstance(getattr(child, "mean", None), Tensor) and isinstance(getattr(child, "std", None), Tensor):
            child.mean.fill_(_PIXEL_MEAN)
            child.std.fill_(_PIXEL_MEAN)
    _init_buffers(module)
    return module


def _random_like(owner: nn.Module, name: str, tensor: Any, device: str, dtype: torch.dtype | None) -> Any:
    if isinstance(tensor, Params4bit):
        weight = torch.empty(tensor.shape, dtype=dtype, device=device).normal_(std=_WEIGHT_STD)
        if isinstance(owner, FusedExperts):
            return pack_experts(weight)
        # `to(device)` packs the weights; the attributes are the settings of the packing.
        return Params4bit(weight, requires_grad=False, **tensor.__dict__).to(device)
    if isinstance(tensor, Int8Params):  # quantised on the way from the host to the GPU, a layer at a time
        # SCB are the scales, which `to(device)` computes.
        settings = {key: value for key, value in tensor.__dict__.items() if key != "SCB"}
        return Int8Params(
            torch.empty(tensor.shape, dtype=dtype).normal_(std=_WEIGHT_STD), requires_grad=False, **settings
        ).to(device)
    values = torch.zeros(tensor.shape, dtype=tensor.dtype, device=device)
    if isinstance(tensor, nn.Parameter):
        # Matrices are random, scales of norms 1, biases 0.
        if tensor.ndim >= 2:
            values.normal_(std=_WEIGHT_STD)
        elif name.endswith("weight"):
            values.fill_(1)
        return nn.Parameter(values, requires_grad=tensor.requires_grad)
    return values


def _init_buffers(module: nn.Module) -> None:
    """Fills buffers by the model classes' own rules, which also draw the weights beside them again."""

    def walk(child: nn.Module, owner: Any) -> None:
        owner = child if isinstance(child, PreTrainedModel) else owner
        if owner is not None and any(buffer is not None for buffer in child._buffers.values()):
            owner._init_weights(child)
        for grandchild in child.children():
            walk(grandchild, owner)

    walk(module, None)


def _set_attention(config: Config, encoder: Any) -> None:
    """Sets FlashAttention where loading would; the meta encoder has PyTorch's attention."""
    if has_plugin_encoder(config):
        return
    attention = tower_attention(config)
    if attention != "sdpa" and (config.is_pretrained_vlm or encoder.has_flash):
        encoder.tower.set_attn_implementation(attention)


def _prompt(config: Config) -> Any:
    """Returns what a captioner needs of its prompt, without a tokenizer: captions stay ids, and no token ends one."""
    # Captions never contain an id behind the vocabulary, so each gets its full length.
    beyond = int(text_config(config).vocab_size)
    return SimpleNamespace(
        question_ids=[1] * (PROMPT_TOKENS // 2), stop_ids=[beyond], pad_id=0, decode=lambda captions: captions
    )


def _size_text(module: nn.Module) -> str:
    count = sum(parameter.numel() for parameter in module.parameters())
    return f"{count / 1e9:.2f} billion weights" if count >= 1e8 else f"{count / 1e6:.1f} million weights"
