"""Memory profiles of the models that compute scores on the GPU after a run, at true size and without weights."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModel

from vlmcap.config import Config
from vlmcap.errors import UserError
from vlmcap.metrics.model_based import BertScorer, SiglipScorer
from vlmcap.models.checkpoint import locate_description
from vlmcap.models.encoders.tower import read_config
from vlmcap.models.known import known_config
from vlmcap.planning.estimate.fake_tensors import fill_with_fake_tensors
from vlmcap.planning.estimate.stages import StageMemory, profile_stage

KEYS = ("siglip_checkpoint", "bert_checkpoint")


def profile_scores(config: Config, has_flash: bool) -> dict[str, StageMemory | None]:
    """Profiles each model that `evaluation` names, by its key; None where its `config.json` is not available.

    Args:
        config: Run configuration.
        has_flash: Whether the GPU has fused attention for grouped queries.
    """
    profiles: dict[str, StageMemory | None] = {}
    for key in KEYS:
        if (checkpoint := getattr(config.evaluation, key)) is not None:
            try:
                profiles[key] = _profile_model(key, _model_config(key, checkpoint), has_flash)
            except UserError:  # a plan is made before anything is downloaded; the run reports what is missing
                profiles[key] = None
    return profiles


def _model_config(key: str, checkpoint: str) -> Any:
    values = known_config(checkpoint) or read_config(locate_description(checkpoint, None, key=f"evaluation.{key}"))
    return AutoConfig.for_model(**values)


def _profile_model(key: str, settings: Any, has_flash: bool) -> StageMemory:
    """Profiles the scorer's pass over a full batch, in float32 like the scorer."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with torch.device("meta"):
        model: Any = AutoModel.from_config(settings, dtype=torch.float32).eval().requires_grad_(False)
    fill_with_fake_tensors(model, mode)
    forward = _text_pass(model) if key == "bert_checkpoint" else _image_pass(model, mode)
    return profile_stage(model, forward, mode=mode, dtype=None, has_flash=has_flash, has_backward=False)


def _text_pass(model: Any) -> Callable[[], Tensor]:
    """Returns a pass over texts of full length that keeps the states of all layers, as the scorer reads one of them."""
    ids = torch.ones(_batch_size(BertScorer), int(model.config.max_position_embeddings), dtype=torch.int64)
    if "roberta" in model.config.model_type:  # its positions start behind the padding id
        # RoBERTa counts positions from pad id + 1, so that many positions are never used.
        ids = ids[:, : -(model.config.pad_token_id + 1)] + model.config.pad_token_id + 1

    def forward() -> Tensor:
        output: Tensor = model(
            input_ids=ids, attention_mask=torch.ones_like(ids), output_hidden_states=True
        ).hidden_states[-1]
        return output

    return forward


def _image_pass(model: Any, mode: FakeTensorMode) -> Callable[[], Tensor]:
    """Returns a pass over frames, or over the most patches where sizes vary; texts are shorter."""
    vision, count = model.config.vision_config, _batch_size(SiglipScorer)
    inputs: dict[str, Any] = {}
    with mode:
        if getattr(vision, "num_patches", None) and model.config.model_type == "siglip2":
            # (B, P, 3 · p · p)
            inputs["pixel_values"] = torch.empty(count, vision.num_patches, 3 * vision.patch_size**2)
        else:
            inputs["pixel_values"] = torch.empty(count, 3, vision.image_size, vision.image_size)  # (B, 3, H, W)
    if model.config.model_type == "siglip2":
        side = int(vision.num_patches**0.5)
        inputs["pixel_attention_mask"] = torch.ones(count, vision.num_patches, dtype=torch.int64)
        inputs["spatial_shapes"] = torch.tensor([[side, side]] * count)

    def forward() -> Tensor:
        pooled: Tensor = model.get_image_features(**inputs).pooler_output
        return pooled

    return forward


def _batch_size(scorer: type) -> int:
    """Returns the scorer's default batch size."""
    return int(inspect.signature(scorer).parameters["batch_size"].default)
