"""The components of VLMs whose frames keep their aspect ratio: Qwen2-VL, Qwen2.5-VL, Qwen3-VL, and their relatives.

Sources: https://arxiv.org/abs/2409.12191, https://arxiv.org/abs/2502.13923, https://arxiv.org/abs/2511.21631.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vlmcap.errors import UserError
from vlmcap.models.encoders.preprocessing import Preprocessing, read_processor
from vlmcap.models.encoders.tower import read_config
from vlmcap.models.llm.attention import check_attention, choose_attention
from vlmcap.models.llm.experts_quantization import check_experts_packed, expert_quantization
from vlmcap.models.llm.load import device_map, keep_packing, load_language_model, quantization_config
from vlmcap.models.pretrained.components import VlmComponents, load_remaining, read_model, reading
from vlmcap.models.pretrained.families import LANGUAGE, TOWERS, family_of, model_class, parsed_config, part_name, sketch
from vlmcap.models.pretrained.qwen_captioner import QwenVLCaptioner, separate_recurrent_layers
from vlmcap.models.pretrained.qwen_vision import ClipTransform, MergerProjector, MergerSpec, QwenVisionEncoder
from vlmcap.models.versions import check_transformers

# Prefixes of the tower's tensors in published checkpoints, and in those that transformers 5 writes.
_TOWER_KEYS = {r"^(?:model\.)?(?:visual|vision_model)\.": ""}


def load_qwen_vl(
    folder: Path,
    *,
    dtype: torch.dtype,
    quantization: str,
    attention: str,
    device: str,
    max_patches: int,
    use_outer_marks: bool,
    is_on_host: bool,
) -> VlmComponents:
    """Loads the components of a Qwen-VL checkpoint; the arguments are those of `load_pretrained`.

    Raises:
        UserError: The folder holds an incomplete model, or no tokenizer.
    """
    from transformers import AutoTokenizer

    model_type = read_config(folder)["model_type"]
    cls = model_class(model_type)
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": choose_attention(attention, device, dtype, cls)}
    options["device_map"] = device_map(device, quantization, is_on_host=is_on_host)
    if quantization != "none":
        config = expert_quantization(folder, quantization_config(quantization, dtype))
        # The vision tower and the head stay unquantised.
        config.llm_int8_skip_modules = ["model.visual", "lm_head"]  # prefixes of names
        options["quantization_config"] = config
    model = read_model(cls, model_type, folder, **options)
    with reading(model_type, folder):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    check_attention(model, options["attn_implementation"])
    if quantization == "4bit":
        keep_packing(model)
        check_experts_packed(model)
    return split_qwen_vl(
        model,
        max_patches=max_patches,
        use_outer_marks=use_outer_marks,
        processor=read_processor(folder),
        tokenizer=tokenizer,
    )


def build_qwen_vl(
    config: Mapping[str, Any], *, dtype: torch.dtype, max_patches: int, use_outer_marks: bool
) -> VlmComponents:
    """Builds the components of a configuration with random weights, without a layout for lack of a tokenizer."""
    model = model_class(config["model_type"])._from_config(parsed_config(config), dtype=dtype)
    return split_qwen_vl(model, max_patches=max_patches, use_outer_marks=use_outer_marks)


def load_patches(
    folder: Path,
    *,
    dtype: torch.dtype,
    attention: str,
    device: str,
    max_patches: int,
    is_on_host: bool,
    **others: Any,
) -> VlmComponents:
    """Loads the components of a model with plain positions; the arguments are those of `load_pretrained`.

    Raises:
        UserError: The folder holds an incomplete model.
    """
    options: dict[str, Any] = {"dtype": dtype, "attention": attention}
    # Read one by one: the whole model is never in memory.
    llm = load_language_model(folder, device=device, is_on_host=is_on_host, **options, **others)
    tower = load_tower(folder, device="cpu" if is_on_host else device, **options)
    whole = _without_parts(read_config(folder))
    load_remaining(whole.model, whole, folder)
    return _patches(whole, tower, llm, max_patches=max_patches, processor=read_processor(folder))


def build_patches(config: Mapping[str, Any], *, dtype: torch.dtype, max_patches: int) -> VlmComponents:
    """Builds the components of a configuration with plain positions, on the meta device."""
    from transformers import AutoModelForCausalLM

    parsed = parsed_config(config)
    llm = AutoModelForCausalLM.from_config(parsed.get_text_config(), dtype=dtype).requires_grad_(False).eval()
    tower_class, vision = tower_class_and_config(config)
    tower = tower_class._from_config(vision, dtype=dtype)
    return _patches(_without_parts(config), tower, llm, max_patches=max_patches)


def _without_parts(config: Mapping[str, Any]) -> Any:
    whole = sketch(config)
    for names in (TOWERS, LANGUAGE):
        setattr(whole.model, part_name(whole.model, names), None)
    return whole


def _patches(
    whole: Any, tower: Any, llm: nn.Module, *, max_patches: int, processor: Mapping[str, Any] | None = None
) -> VlmComponents:
    setattr(whole.model, part_name(whole.model, TOWERS), tower)
    mergers, model_type = mergers_of(whole.model), whole.config.model_type
    encoder = vision_encoder(model_type, tower, max_patches=max_patches, processor=processor)
    spec, text = MergerSpec(tower.config.spatial_merge_size, encoder.grid), family_of(model_type).text
    # Trained in float32, whatever the dtype of the frozen weights is.
    projector = MergerProjector(mergers, spec).float().requires_grad_(True)
    return VlmComponents(
        encoder, projector, llm, num_tokens=spec.num_tokens, visual_prefix=text.before, visual_suffix=text.after
    )


def split_qwen_vl(
    model: Any,
    *,
    max_patches: int,
    use_outer_marks: bool,
    processor: Mapping[str, Any] | None = None,
    tokenizer: Any = None,
) -> VlmComponents:
    """Splits a transformers model into components, in place.

    Args:
        model: Model of the family's class.
        max_patches: Maximum patches per frame.
        use_outer_marks: As for `load_pretrained`.
        processor: Content of the checkpoint's processor file.
        tokenizer: Encodes the timestamps of Qwen3-VL.

    Raises:
        UserError: `max_patches` is below one token per frame, or transformers is too old for these models.
    """
    check_transformers("the Qwen-VL models")
    family, tower = family_of(model.config.model_type), model.model.visual
    mergers = mergers_of(model.model)
    encoder = vision_encoder(model.config.model_type, tower, max_patches=max_patches, processor=processor)
    spec = MergerSpec(tower.config.spatial_merge_size, encoder.grid)
    model.model.visual = None  # the encoder owns the tower now
    # With timestamps, each run has its own pair of marks, of which the last end mark belongs to the prompt. The outer
    # pair is an additional one.
    num_marks = int(use_outer_marks) if family.has_runs else 1
    start, end = "<|vision_start|>", family.text.after
    return VlmComponents(
        encoder=encoder,
        projector=MergerProjector(mergers, spec).float().requires_grad_(True),
        llm=model.requires_grad_(False).eval(),
        num_tokens=spec.num_tokens,
        captioner_class=partial(
            QwenVLCaptioner,
            frames_per_patch=tower.config.temporal_patch_size,
            is_recurrent=separate_recurrent_layers(model),
        ),
        visual_prefix=start * num_marks,
        visual_suffix=end * (num_marks + family.has_runs),
        run_text=family.text if family.has_runs else None,
        tokenizer=tokenizer,
        frames_per_run=tower.config.temporal_patch_size,
    )


def mergers_of(model: Any) -> list[nn.Module]:
    """Returns the merger of the last layer, then one for each DeepStack layer, of the base model of a class.

    HyperCLOVA X has a further projector behind the merger.
    """
    tower, behind = getattr(model, part_name(model, TOWERS)), getattr(model, "projector", None)
    # Some classes have a further projector behind the merger.
    merger = tower.merger if behind is None else nn.Sequential(tower.merger, behind)
    return [merger, *getattr(tower, "deepstack_merger_list", ())]


def load_tower(folder: Path, *, dtype: torch.dtype, attention: str, device: str) -> Any:
    """Loads the vision tower of a checkpoint in the class of transformers; the language model is not read.

    Raises:
        UserError: The folder holds an incomplete tower.
    """
    tower_class, config = tower_class_and_config(read_config(folder))
    options: dict[str, Any] = {"attn_implementation": choose_attention(attention, device, dtype, tower_class)}
    options["device_map"] = {"": device}
    kind = read_config(folder)["model_type"]
    return read_model(tower_class, kind, folder, config=config, key_mapping=_TOWER_KEYS, dtype=dtype, **options)


def tower_class_and_config(config: Mapping[str, Any]) -> tuple[Any, Any]:
    """Returns class and configuration of a model's vision tower."""
    base = sketch(config).model
    return type(getattr(base, part_name(base, TOWERS))), parsed_config(config).vision_config


def vision_encoder(
    model_type: str, tower: Any, *, max_patches: int, processor: Mapping[str, Any] | None = None
) -> QwenVisionEncoder:
    """Builds the frozen encoder around a vision tower, whose mergers are removed.

    Args:
        model_type: Model type of the whole model.
        tower: Vision tower of transformers.
        max_patches: Maximum patches per frame.
        processor: Content of the checkpoint's processor file.

    Raises:
        UserError: `max_patches` is below one token per frame.
    """
    vision, default = tower.config, family_of(model_type).preprocessing
    assert isinstance(default, Preprocessing), "the table states the preprocessing of these families"
    preprocessing = default.updated(processor or {})
    merge = vision.spatial_merge_size
    if max_patches < merge**2:
        raise UserError(f"encoder.max_patches must be at least {merge**2} for this model, not {max_patches}")
    transform = ClipTransform(
        vision.patch_size, vision.temporal_patch_size, merge, max_patches, preprocessing.resampling
    )
    return QwenVisionEncoder(tower, transform=transform, preprocessing=preprocessing).requires_grad_(False).eval()
