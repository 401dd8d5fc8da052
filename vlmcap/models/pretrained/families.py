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
        is_bidirectional: Whether the tokens of a run attend to each other in both directions.
        prefix: Fixed text in front of all of that, which is tokenised together with the text before it.
        preprocessing: Preprocessing of a checkpoint without a processor file, except for kind "frames", where it
            follows from the vision tower.
    """

    kind: str
    text: RunText = _NOTHING
    has_runs: bool = False
    is_bidirectional: bool = False
    prefix: str = ""
    preprocessing: Preprocessing | None = None


_MARKS = RunText(before="<|vision_start|>", after="<|vision_end|>")
_TIMED = RunText(before="<{seconds:.1f} seconds><|vision_start|>", after="<|vision_end|>")
_NUMBERED = RunText(before="Frame{number}: <img>", after="</img>", between="\n", end="\n")
_TILE = RunText(before="<fake_token_around_image><global-img>", after="<fake_token_around_image>")
_CLOCK = RunText(
    start=" {count} frames from a {duration} [H:MM:SS] video.\n",
    before="\nFrame from {clock}:" + _TILE.before,
    after=_TILE.after,
    end="\n\n",
)
_AYA = RunText(before="<|START_OF_IMG|>TILE_GLOBAL", after="<|END_OF_IMG|>")
_COMMAND = RunText(before="<|START_OF_IMG|>", after="<|IMG_LINE_BREAK|><|END_OF_IMG|>")
_GEMMA = RunText(after="<end_of_image>\n\n", between="\n\n<start_of_image>")
_JANUS = RunText(before="<begin_of_image>", after="<end_of_image>")
_CLIP = Preprocessing((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
_HALF = Preprocessing((0.5,) * 3, (0.5,) * 3)
FAMILIES = {
    "aya_vision": VlmFamily("frames", _AYA, has_runs=True),
    "cohere2_vision": VlmFamily("frames", _COMMAND, has_runs=True),
    "deepseek_vl": VlmFamily("frames"),
    "gemma3": VlmFamily("frames", _GEMMA, has_runs=True, is_bidirectional=True, prefix="\n\n<start_of_image>"),
    "idefics3": VlmFamily("frames", _TILE, has_runs=True),
    "internvl": VlmFamily("frames", _NUMBERED, has_runs=True),
    "janus": VlmFamily("frames", _JANUS, has_runs=True),
    "llava": VlmFamily("frames"),
    "llava_next_video": VlmFamily("frames"),
    "llava_onevision": VlmFamily("frames"),
    "smolvlm": VlmFamily("frames", _CLOCK, has_runs=True, prefix="You are provided the following series of"),
    "exaone4_5": VlmFamily("patches", RunText(before="<vision>", after="</vision>"), preprocessing=_CLIP),
    "hyperclovax_vision_v2": VlmFamily(
        "patches", RunText(before="<|video_start|>", after="<|video_end|>"), preprocessing=_CLIP
    ),
    "qwen2_vl": VlmFamily("mrope", _MARKS, preprocessing=_CLIP),
    "qwen2_5_vl": VlmFamily("mrope", _MARKS, preprocessing=_CLIP),
    "qwen3_vl": VlmFamily("timed_mrope", _TIMED, has_runs=True, preprocessing=_HALF),
    "qwen3_vl_moe": VlmFamily("timed_mrope", _TIMED, has_runs=True, preprocessing=_HALF),
    "qwen3_5": VlmFamily("timed_mrope", _TIMED, has_runs=True, preprocessing=_HALF),
}


_NO_GRID = "its vision tower gives no token for each patch of a square frame"
_REASONS = {  # that no signature or configuration states
    "aria": "it reads its vision tower in front of the final norm",
    "blip": "its language model reads images by cross-attention",
    "blip-2": "its visual tokens come from a Q-Former",
    "chameleon": "its images are codes of a VQ-VAE",
    "deepseek_ocr2": _NO_GRID,
    "florence2": "its language model is an encoder and a decoder",
    "gemma3n": "its vision tower comes from timm",
    "gemma4": "its class needs the positions of patches besides pixels",
    "gemma4_unified": "its class needs the positions of patches besides pixels",
    "got_ocr2": "its projector convolves a map of features instead of reading patches",
    "idefics2": "its projector needs a mask of patches besides features",
    "inkling_mm_model": _NO_GRID,
    "llama4": _NO_GRID,
    "ovis2": "its visual tokens are mixtures of the rows of a table",
    "paligemma": "its language model attends to the whole prompt in both directions",
    "pp_chart2table": "its projector convolves a map of features instead of reading patches",
    "qianfan_ocr": "its files stack and name the weights of its vision tower in their own way",
    "shieldgemma2": "it rates images and describes none",
    "step3p7": _NO_GRID,
    "unlimited_ocr": _NO_GRID,
    "video_llava": "it has one vision tower for images and another one for videos",
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
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    if model_type not in known_types():
        return "it is no model of images and text in the installed transformers"
    head_class = model_class(model_type)
    if not hasattr(_base_class(head_class), "get_image_features"):
        return "its class has no function from pixels to visual tokens"
    if model_type in _REASONS:
        return _REASONS[model_type]
    parameters = inspect.signature(_base_class(head_class).get_image_features).parameters
    # Required arguments besides the pixels.
    others = [
        name
        for name, value in parameters.items()
        if name not in ("self", "pixel_values") and value.default is value.empty and value.kind not in _VARIADIC
    ]
    if others and others != ["image_grid_thw"]:
        return f"its class needs {' and '.join(others)} besides pixels"
    config = head_class.config_class()
    if not isinstance(getattr(config, "vision_feature_layer", -1), int):
        return "it joins several layers of its vision tower"
    if getattr(getattr(config, "vision_config", None), "model_type", None) == TIMM:
        return "its vision tower comes from timm"
    if "image_grid_thw" in parameters:
        return "its positions of patches were not compared with its class"
    if type(config.get_text_config()) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return "its language model has no causal class of its own"
    return "it was not compared with its class"


def known_types() -> dict[str, Any]:
    """Returns all model types of images and text in the installed transformers, with the names of their classes."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    return dict(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)


def model_class(model_type: str) -> Any:
    """Returns the class of transformers for a model type."""
    import transformers

    return getattr(transformers, known_types()[model_type])


def _base_class(head_class: Any) -> Any:
    """Returns the class of the model inside a class with a head; the class itself if it has no such model."""
    name = head_class.__name__.replace("ForConditionalGeneration", "Model")
    return getattr(sys.modules[head_class.__module__], name, head_class)


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
