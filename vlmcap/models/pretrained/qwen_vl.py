"""The components of Qwen2-VL, Qwen2.5-VL and Qwen3-VL.

Sources: https://arxiv.org/abs/2409.12191, https://arxiv.org/abs/2502.13923, https://arxiv.org/abs/2511.21631.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from vlmcap.errors import UserError
from vlmcap.models.encoders.preprocessing import Preprocessing, read_processor
from vlmcap.models.llm.attention import check_attention, choose_attention
from vlmcap.models.llm.load import device_map, keep_packing, quantization_config
from vlmcap.models.pretrained.components import VlmComponents, read_model, reading
from vlmcap.models.pretrained.qwen_captioner import VISION_END, VISION_START, QwenVLCaptioner, TimestampedRuns
from vlmcap.models.pretrained.qwen_vision import ClipTransform, MergerProjector, MergerSpec, QwenVisionEncoder
from vlmcap.models.versions import check_transformers


@dataclass(frozen=True, slots=True)
class QwenFamily:
    """Differences between the three families.

    Attributes:
        class_name: Name of the transformers class.
        tower_name: Class name of its vision tower, in the same module.
        preprocessing: Preprocessing of a checkpoint without a processor file.
        has_timestamps: Whether the prompt states the time of each temporal patch.
    """

    class_name: str
    tower_name: str
    preprocessing: Preprocessing
    has_timestamps: bool = False


_CLIP = Preprocessing((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
FAMILIES = {
    "qwen2_vl": QwenFamily("Qwen2VLForConditionalGeneration", "Qwen2VisionTransformerPretrainedModel", _CLIP),
    "qwen2_5_vl": QwenFamily("Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VisionTransformerPretrainedModel", _CLIP),
    "qwen3_vl": QwenFamily(
        "Qwen3VLForConditionalGeneration",
        "Qwen3VLVisionModel",
        Preprocessing((0.5,) * 3, (0.5,) * 3),
        has_timestamps=True,
    ),
}


def load_qwen_vl(
    kind: str,
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
    import transformers

    model_class = getattr(transformers, FAMILIES[kind].class_name)
    options: dict[str, Any] = {
        "dtype": dtype,
        "attn_implementation": choose_attention(attention, device, dtype, model_class),
    }
    options["device_map"] = device_map(device, quantization, is_on_host=is_on_host)
    if quantization != "none":
        config = quantization_config(quantization, dtype)
        config.llm_int8_skip_modules = ["model.visual", "lm_head"]  # prefixes of names
        options["quantization_config"] = config
    model = read_model(model_class, kind, folder, **options)
    with reading(kind, folder):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    check_attention(model, options["attn_implementation"])
    if quantization == "4bit":
        keep_packing(model)
    processor = read_processor(folder)
    return split_qwen_vl(
        kind, model, max_patches=max_patches, use_outer_marks=use_outer_marks, processor=processor, tokenizer=tokenizer
    )


def build_qwen_vl(
    kind: str, config: Mapping[str, Any], *, dtype: torch.dtype, max_patches: int, use_outer_marks: bool
) -> VlmComponents:
    """Builds the components of a configuration with random weights, without `visual_layout` for lack of a tokenizer."""
    import transformers

    model_class = getattr(transformers, FAMILIES[kind].class_name)
    model = model_class._from_config(model_class.config_class.from_dict(dict(config)), dtype=dtype)
    return split_qwen_vl(kind, model, max_patches=max_patches, use_outer_marks=use_outer_marks)


def split_qwen_vl(
    kind: str,
    model: Any,
    *,
    max_patches: int,
    use_outer_marks: bool,
    processor: Mapping[str, Any] | None = None,
    tokenizer: Any = None,
) -> VlmComponents:
    """Splits a transformers model into components, in place.

    Args:
        kind: Key of `FAMILIES`.
        model: Model of the family's class.
        max_patches: Maximum patches per frame.
        use_outer_marks: As for `load_pretrained`.
        processor: Content of the checkpoint's processor file.
        tokenizer: Encodes the timestamps of Qwen3-VL.

    Raises:
        UserError: `max_patches` is below one token per frame, or transformers is too old for these models.
    """
    check_transformers("the Qwen-VL models")
    family, tower = FAMILIES[kind], model.model.visual
    merge, span = tower.config.spatial_merge_size, tower.config.temporal_patch_size
    mergers = [tower.merger, *getattr(tower, "deepstack_merger_list", ())]
    encoder = vision_encoder(kind, tower, max_patches=max_patches, processor=processor)
    spec = MergerSpec(merge, encoder.grid)
    model.model.visual = None  # the encoder owns the tower now
    is_timed = family.has_timestamps and tokenizer is not None
    # With timestamps, each run has its own pair of marks, of which the last end mark belongs to the prompt. The outer
    # pair is an additional one.
    num_marks = int(use_outer_marks) if family.has_timestamps else 1
    return VlmComponents(
        encoder=encoder,
        projector=MergerProjector(mergers, spec).float().requires_grad_(True),
        llm=model.requires_grad_(False).eval(),
        num_tokens=spec.num_tokens,
        captioner_class=partial(QwenVLCaptioner, frames_per_patch=span),
        visual_prefix=VISION_START * num_marks,
        visual_suffix=VISION_END * (num_marks + family.has_timestamps),
        visual_layout=TimestampedRuns(spec, tokenizer, span) if is_timed else None,
    )


def vision_encoder(
    kind: str, tower: Any, *, max_patches: int, processor: Mapping[str, Any] | None = None
) -> QwenVisionEncoder:
    """Builds the frozen encoder around a vision tower, whose mergers are removed.

    Args:
        kind: Key of `FAMILIES`.
        tower: Vision tower of transformers.
        max_patches: Maximum patches per frame.
        processor: Content of the checkpoint's processor file.

    Raises:
        UserError: `max_patches` is below one token per frame.
    """
    vision, preprocessing = tower.config, FAMILIES[kind].preprocessing.updated(processor or {})
    merge = vision.spatial_merge_size
    if max_patches < merge**2:
        raise UserError(f"encoder.max_patches must be at least {merge**2} for this model, not {max_patches}")
    transform = ClipTransform(
        vision.patch_size, vision.temporal_patch_size, merge, max_patches, preprocessing.resampling
    )
    return QwenVisionEncoder(tower, transform=transform, preprocessing=preprocessing).requires_grad_(False).eval()
