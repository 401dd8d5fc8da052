"""Families of pretrained VLMs by model type: the few facts that the classes of transformers do not state."""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from vlmcap.errors import UserError
from vlmcap.models.encoders.classes import TIMM
from vlmcap.models.encoders.preprocessing import Preprocessing
from vlmcap.models.pretrained.components import RunText

TOWERS = ("visual", "vision_tower", "vision_model")  # names of the vision tower in a class of transformers
_VARIADIC = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
LANGUAGE = ("language_model", "text_model")  # names of the language model without its head


_NOTHING = RunText()


@dataclass(frozen=True, slots=True)
class VlmFamily:
    """Facts about a model type.

    Attributes:
        kind: Kind in the configuration: "frames", "patches", "mrope" or "timed_mrope".
        text: Text around the visual tokens.
        has_runs: Whether each frame (or temporal patch) has a run of its own, instead of one run per clip.
        preprocessing: Preprocessing of a checkpoint without a processor file, except for kind "frames", where it
            follows from the vision tower.
    """

    kind: str
    text: RunText = _NOTHING
    has_runs: bool = False
    preprocessing: Preprocessing | None = None


_MARKS = RunText("<|vision_start|>", "<|vision_end|>")
_TIMED = RunText("<{seconds:.1f} seconds><|vision_start|>", "<|vision_end|>")
_NUMBERED = RunText("Frame{number}: <img>", "</img>", between="\n", end="\n")
_CLIP = Preprocessing((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
_HALF = Preprocessing((0.5,) * 3, (0.5,) * 3)
FAMILIES = {
    "internvl": VlmFamily("frames", _NUMBERED, has_runs=True),
    "llava": VlmFamily("frames"),
    "llava_next_video": VlmFamily("frames"),
    "llava_onevision": VlmFamily("frames"),
    "exaone4_5": VlmFamily("patches", RunText("<vision>", "</vision>"), preprocessing=_CLIP),
    "hyperclovax_vision_v2": VlmFamily("patches", RunText("<|video_start|>", "<|video_end|>"), preprocessing=_CLIP),
    "qwen2_vl": VlmFamily("mrope", _MARKS, preprocessing=_CLIP),
    "qwen2_5_vl": VlmFamily("mrope", _MARKS, preprocessing=_CLIP),
    "qwen3_vl": VlmFamily("timed_mrope", _TIMED, has_runs=True, preprocessing=_HALF),
    "qwen3_vl_moe": VlmFamily("timed_mrope", _TIMED, has_runs=True, preprocessing=_HALF),
    "qwen3_5": VlmFamily("timed_mrope", _TIMED, has_runs=True, preprocessing=_HALF),
}


def family_of(model_type: Any) -> VlmFamily:
    """Returns the facts about a model type.

    Raises:
        UserError: The model type is not supported.
    """
    if model_type not in FAMILIES:
        raise UserError(
            f"the checkpoint has the model type {model_type}, but pretrained VLMs must be one of "
            f"{', '.join(FAMILIES)}, as {obstacle(model_type)}; assemble its components with encoder=custom and "
            "llm=custom"
        )
    return FAMILIES[model_type]


def obstacle(model_type: Any) -> str:
    """Returns why a model type without a row in `FAMILIES` is not supported, read from its class in transformers."""
    if model_type not in known_types():
        return "it is no model of images and text in the installed transformers"
    found = model_class(model_type)
    if not hasattr(_base_class(found), "get_image_features"):
        return "its class has no function from pixels to visual tokens"
    if "token_type_ids" in inspect.signature(found.forward).parameters:
        return "its language model attends to visual tokens in both directions"
    parameters = inspect.signature(_base_class(found).get_image_features).parameters
    # Required arguments besides the pixels.
    others = [
        name
        for name, value in parameters.items()
        if name not in ("self", "pixel_values") and value.default is value.empty and value.kind not in _VARIADIC
    ]
    if others and others != ["image_grid_thw"]:
        return f"its class needs {' and '.join(others)} besides pixels"
    if getattr(getattr(found.config_class(), "vision_config", None), "model_type", None) == TIMM:
        return "its vision tower comes from timm"
    if "image_grid_thw" in parameters:
        return "its positions of patches were not compared with its class"
    return "it was not compared with its class"


def known_types() -> dict[str, Any]:
    """Returns all model types of images and text in the installed transformers, with the names of their classes."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    return dict(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)


def model_class(model_type: str) -> Any:
    """Returns the class of transformers for a model type."""
    import transformers

    return getattr(transformers, known_types()[model_type])


def _base_class(found: Any) -> Any:
    """Returns the class of the model inside a class with a head; the class itself if it has no such model."""
    name = found.__name__.replace("ForConditionalGeneration", "Model")
    return getattr(sys.modules[found.__module__], name, found)


def parsed_config(config: Mapping[str, Any]) -> Any:
    """Returns transformers' configuration of the content of a `config.json`."""
    parsed = model_class(config["model_type"]).config_class.from_dict(copy.deepcopy(dict(config)))
    # The text section alone does not say that head and embedding are one.
    if parsed.tie_word_embeddings:
        parsed.get_text_config().tie_word_embeddings = True
    return parsed


def sketch(config: Mapping[str, Any]) -> Any:
    """Builds the whole model in float32 on the meta device, with one block of its language model only."""
    parsed = parsed_config(config)
    text = parsed.get_text_config()
    # One block is enough, as the language model is not run.
    text.num_hidden_layers = 1
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:1]
    with torch.device("meta"):
        return model_class(config["model_type"])._from_config(parsed, dtype=torch.float32)


def part_name(model: Any, names: tuple[str, ...]) -> str:
    """Returns the name under which the base model of a class has a part, of `TOWERS` or `LANGUAGE`."""
    return next(name for name in names if name in model._modules)
