"""The components of LLaVA-NeXT-Video: a layer of CLIP without CLS, average pooling, a two-layer MLP, a language model.

Source: https://llava-vl.github.io/blog/2024-04-30-llava-next-video.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vlmcap.config import MlpConfig, Reducer, Temporal
from vlmcap.errors import UserError
from vlmcap.models.encoders import EncoderOptions, VisionEncoder, build_encoder, load_encoder
from vlmcap.models.encoders.tower import read_config
from vlmcap.models.llm.load import load_language_model, text_width
from vlmcap.models.pretrained.components import VlmComponents
from vlmcap.models.projectors import Projector, ProjectorSizes, build_projector, count_tokens, load_projector_weights

# Settings of the published checkpoints; the class supports others too.
_SETTINGS = {
    "spatial_pool_mode": "average",
    "vision_feature_select_strategy": "default",
    "projector_hidden_act": "gelu",
    "multimodal_projector_bias": True,
}


def load_llava(
    folder: Path, *, dtype: torch.dtype, quantization: str, attention: str, device: str, is_on_host: bool
) -> VlmComponents:
    """Loads the components of a LLaVA-NeXT-Video checkpoint; the arguments are those of `load_pretrained`.

    Raises:
        UserError: The folder holds an incomplete model, or one with another pooling or projector.
    """
    config = read_config(folder)
    encoder = load_encoder(folder, vision_options(config, dtype), "cpu" if is_on_host else device)
    projector = _projector(config, encoder, text_width(folder))
    load_projector_weights(projector, folder)
    llm = load_language_model(
        folder, dtype=dtype, quantization=quantization, attention=attention, device=device, is_on_host=is_on_host
    )
    return _components(encoder, projector, llm)


def build_llava(config: Mapping[str, Any], *, dtype: torch.dtype) -> VlmComponents:
    """Builds the components of a configuration with random weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    text = AutoConfig.for_model(**config["text_config"])
    encoder = build_encoder(config, vision_options(config, dtype))
    llm = AutoModelForCausalLM.from_config(text, dtype=dtype).requires_grad_(False).eval()
    return _components(encoder, _projector(config, encoder, int(text.hidden_size)), llm)


def vision_options(config: Mapping[str, Any], dtype: torch.dtype) -> EncoderOptions:
    """Returns the options of a checkpoint's vision tower.

    Raises:
        UserError: The checkpoint has settings that differ from the published ones.
    """
    layer = config.get("vision_feature_layer", -2)
    for key, value in _SETTINGS.items():
        if config.get(key, value) != value:
            raise UserError(
                f"model.checkpoint has {key}={config[key]} in its config.json, but only {value} is supported; use "
                "another checkpoint"
            )
    if not isinstance(layer, int):
        raise UserError(
            f"model.checkpoint joins the layers {layer} of its vision tower, but only one layer is supported; use "
            "another checkpoint"
        )
    return EncoderOptions(feature_layer=layer, dtype=dtype)


def _projector(config: Mapping[str, Any], encoder: VisionEncoder, out_dim: int) -> Projector:
    stride = int(config.get("spatial_pool_stride", 2))
    if any(side % stride for side in encoder.grid):  # the class drops patches at the edge, which our reducer averages
        rows, columns = encoder.grid
        raise UserError(
            f"model.checkpoint pools {stride} × {stride} of {rows} × {columns} patches, which does not divide evenly; "
            "use another checkpoint"
        )
    settings = MlpConfig(depth=2, reducer=Reducer.pool, pool_size=stride, temporal=Temporal.none)
    return build_projector(settings, ProjectorSizes(encoder.embed_dim, out_dim, encoder.grid, num_frames=1))


def _components(encoder: VisionEncoder, projector: Projector, llm: nn.Module) -> VlmComponents:
    return VlmComponents(encoder, projector, llm, partial(count_tokens, projector.config, projector.sizes))
