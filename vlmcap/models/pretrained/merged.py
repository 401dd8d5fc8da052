"""Merges trained weights into a pretrained VLM, reassembled in its transformers class for other programs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vlmcap.errors import UserError
from vlmcap.models.encoders.tower import read_config
from vlmcap.models.llm.merge import Progress, load_adapters, load_unadapted_weights, merge, refuse_quantized
from vlmcap.models.pretrained.components import read_model
from vlmcap.models.pretrained.families import LANGUAGE, TOWERS, family_of, model_class, part_name
from vlmcap.models.pretrained.qwen_vl import mergers_of


def merged_pretrained(
    folder: Path,
    weights: Mapping[str, Tensor],
    *,
    adapt: Callable[[nn.Module], nn.Module] | None,
    dtype: torch.dtype,
    device: str = "cpu",
    progress: Progress | None = None,
) -> tuple[nn.Module, float]:
    """Merges trained weights into a pretrained VLM.

    Args:
        folder: Base checkpoint of the run, unquantised.
        weights: State of a checkpoint: projector, adapters, or trained weights of the language model itself.
        adapt: Adds adapters to the language model as in training; None without adapters.
        dtype: Dtype of the merged weights.
        device: Device of the merge; it must have room for the language model.
        progress: Callback `(merged_layers, total_layers)`.

    Returns:
        The model in its transformers class, on the CPU, and the difference of logits from `merge`, 0 without adapters.

    Raises:
        UserError: The folder cannot be loaded, or the weights do not fit it.
    """
    projector = {
        n.removeprefix("captioner.projector."): t for n, t in weights.items() if n.startswith("captioner.projector.")
    }
    model_type = read_config(folder)["model_type"]
    family = family_of(model_type)
    whole = read_model(model_class(model_type), model_type, folder, dtype=dtype, attn_implementation="sdpa")
    whole.requires_grad_(False).eval()
    if family.kind == "frames":
        _load(whole, projector)  # under the names of the class
    else:
        _load(nn.ModuleDict({"mergers": nn.ModuleList(mergers_of(whole.model))}), projector)
    refuse_quantized(whole)
    # The tower must not be among the layers that get adapters.
    tower_name = part_name(whole.model, TOWERS)
    tower = getattr(whole.model, tower_name)
    setattr(whole.model, tower_name, None)
    # Qwen-VL classes run without their tower; the others need a causal model around the shared layers.
    language = whole if "mrope" in family.kind else _causal_model(whole)
    difference = 0.0
    if adapt is None:
        load_unadapted_weights(language, weights)
    else:
        adapted = adapt(language.to(device))
        load_adapters(adapted, weights)
        _, difference = merge(adapted, progress)  # in place: `whole` shares the layers
    whole.to("cpu")
    setattr(whole.model, tower_name, tower)
    return whole, difference


def _causal_model(whole: Any) -> Any:
    """Returns a causal language model that shares the layers of a whole model."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        language = AutoModelForCausalLM.from_config(whole.config.get_text_config(), dtype=whole.dtype)
    # Shared, not copied: what is merged there is merged in `whole`.
    language.model = getattr(whole.model, part_name(whole.model, LANGUAGE))
    language.lm_head = whole.lm_head
    return language.requires_grad_(False).eval()


def _load(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Loads trained weights of the projector, if there are any; modules with other names keep theirs.

    Raises:
        UserError: They belong to another projector.
    """
    shapes = {name: tensor.shape for name, tensor in module.state_dict().items()}
    if any(shapes.get(name) != tensor.shape for name, tensor in weights.items()):
        raise UserError(
            "the checkpoint's projector does not fit model.checkpoint; set model.checkpoint to that of the run"
        )
    module.load_state_dict(dict(weights), strict=False)
