"""transformers classes of vision towers, and the sizes in their configurations."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import torch
from torch import nn

from vlmcap.errors import UserError, first_line

TIMM = "timm_wrapper"
"""Type of a timm model, whose configuration has a name but no sizes."""


class UnknownLayoutError(ValueError):
    """The output of a class is not a grid of patch features; the message completes "…, which"."""


def tower_class(config: Any) -> Any:
    """Returns the transformers class of a configuration.

    Raises:
        UnknownLayoutError: There is no such class.
    """
    from transformers import PreTrainedModel
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    try:
        classes = MODEL_MAPPING[type(config)]
    # Inner configurations, such as the vision section of a VLM, are in no mapping of transformers: look in the module
    # of
    # their own model.
    except (KeyError, ValueError):
        module = importlib.import_module(type(config).__module__.replace(".configuration_", ".modeling_"))
        models: list[Any] = [
            value for value in vars(module).values() if inspect.isclass(value) and issubclass(value, PreTrainedModel)
        ]
        classes = [model for model in models if model.config_class is type(config) and "forward" in vars(model)]
        if not classes:
            raise UnknownLayoutError("has no class of its own in transformers") from None
    # Some types have several classes; the first one is the model itself.
    return classes[0] if isinstance(classes, list | tuple) else classes


def pixels_argument(model_class: Any) -> str:
    """Returns the argument of `forward` that takes the pixels; empty if the class takes no images or videos."""
    parameters = inspect.signature(model_class.forward).parameters
    return next((name for name in ("pixel_values", "pixel_values_videos") if name in parameters), "")


def fixed_arguments(model_class: Any) -> dict[str, bool]:
    """Returns arguments that leave out what the features do not depend on, such as V-JEPA 2's predictor."""
    return {"skip_predictor": True} if "skip_predictor" in inspect.signature(model_class.forward).parameters else {}


def frames_per_token(config: Any) -> int:
    """Returns how many consecutive frames a video tower joins to one token; 0 for a tower of single images."""
    size = getattr(config, "tubelet_size", None)
    return size if isinstance(size, int) else 0


def frame_size(config: Any) -> Any:
    """Returns the side or sides of a frame in pixels that a configuration states; None if it states none."""
    return getattr(config, "image_size", None) or getattr(config, "crop_size", None)


def set_depth(config: Any, num_blocks: int) -> None:
    """Sets the number of blocks of a tower."""
    config.num_hidden_layers = num_blocks
    # A list with an entry per block, which transformers checks against the number of blocks.
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:num_blocks]
    # timm reads the depth from the arguments of its own constructor.
    if config.model_type == TIMM:
        config.model_args = {**(config.model_args or {}), "depth": num_blocks}


def describe_timm(config: Any) -> None:
    """Adds the sizes to the configuration of a timm model, unless it has no blocks or patches.

    Raises:
        UnknownLayoutError: timm is not installed, or has no such model.
    """
    try:
        with torch.device("meta"):
            model = tower_class(config)._from_config(config).timm_model
    except ImportError as error:
        raise UnknownLayoutError(f"needs timm ({first_line(error)}); run `pip install timm`, or") from error
    patches: Any = getattr(model, "patch_embed", None)
    blocks = getattr(model, "blocks", None)
    if isinstance(blocks, nn.Sequential | nn.ModuleList) and getattr(patches, "patch_size", None):
        config.hidden_size, config.patch_size = int(model.num_features), list(patches.patch_size)
        config.image_size = None if patches.img_size is None else list(patches.img_size)
        set_depth(config, len(blocks))


def square_side(size: Any) -> int:
    """Returns the side of a square that a configuration states as one or two numbers.

    Raises:
        UnknownLayoutError: It is not a square.
    """
    sides = set(size) if isinstance(size, list | tuple) else {size}
    if len(sides) != 1 or not isinstance(next(iter(sides)), int):
        raise UnknownLayoutError(f"has no square frames and patches ({size})")
    return int(sides.pop())


def refusal(source: str, config: Any, error: UnknownLayoutError) -> UserError:
    """Returns the error for a checkpoint whose class has no known layout."""
    return UserError(
        f"{source} holds a model of type '{config.model_type}', which {error}; "
        "set encoder.checkpoint to a vision tower of square patches, such as DINOv2, SigLIP or CLIP"
    )
