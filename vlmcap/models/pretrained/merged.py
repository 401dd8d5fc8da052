"""Merges trained weights into a pretrained VLM, reassembled in its transformers class for other programs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vlmcap.errors import UserError
from vlmcap.models.llm.merge import Progress, load_adapters, load_unadapted_weights, merge, refuse_quantized
from vlmcap.models.pretrained.components import read_model
from vlmcap.models.pretrained.qwen_vl import load_qwen_vl

# Layers of `Projector` and their names in the transformers class.
_LLAVA_PROJECTOR = {"projection.layers.0": "linear_1", "projection.layers.2": "linear_2"}


def merged_pretrained(
    kind: str,
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
        kind: As for `load_pretrained`.
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
    if kind == "llava_next_video":
        whole, language = _load_llava(folder, dtype)
        renamed = {_llava_name(name): tensor for name, tensor in projector.items()}
        _load_projector(whole.model.multi_modal_projector, renamed)
    else:
        whole = language = _load_qwen(kind, folder, dtype, projector)
    refuse_quantized(whole)
    # The tower must not be among the layers that get adapters.
    visual = _detach_visual(whole)
    difference = 0.0
    if adapt is None:
        load_unadapted_weights(language, weights)
    else:
        adapted = adapt(language.to(device))
        load_adapters(adapted, weights)
        _, difference = merge(adapted, progress)  # in place: `whole` shares the layers
    whole.to("cpu")
    if visual is not None:
        whole.model.visual = visual
    return whole, difference


def _load_qwen(kind: str, folder: Path, dtype: torch.dtype, projector: Mapping[str, Tensor]) -> Any:
    """Loads the model with its tower and the trained mergers."""
    components = load_qwen_vl(
        kind,
        folder,
        dtype=dtype,
        quantization="none",
        attention="sdpa",
        device="cpu",
        is_on_host=True,
        max_patches=1 << 10,
        use_outer_marks=True,
    )
    _load_projector(components.projector, projector)
    whole: Any = components.llm
    tower: Any = components.encoder.tower
    first, *deep = components.projector.mergers
    tower.merger = first
    if deep:
        tower.deepstack_merger_list = nn.ModuleList(deep)
    whole.model.visual = tower.to(dtype)
    return whole


def _load_llava(folder: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """Loads the model, and returns it with a causal language model that shares its layers."""
    import transformers

    model_class = transformers.LlavaNextVideoForConditionalGeneration
    whole = read_model(model_class, "llava_next_video", folder, dtype=dtype, attn_implementation="sdpa")
    with torch.device("meta"):
        language = transformers.AutoModelForCausalLM.from_config(whole.config.text_config, dtype=dtype)
    language.model, language.lm_head = whole.model.language_model, whole.lm_head
    return whole.requires_grad_(False).eval(), language.requires_grad_(False).eval()


def _detach_visual(whole: Any) -> Any:
    """Detaches Qwen's tower from the model, as in training; LLaVA's is not inside the adapted language model."""
    visual = getattr(whole.model, "visual", None)
    if visual is not None:
        whole.model.visual = None
    return visual


def _llava_name(name: str) -> str:
    layer, _, leaf = name.rpartition(".")
    return f"{_LLAVA_PROJECTOR.get(layer, layer)}.{leaf}"


def _load_projector(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Loads trained weights into the projector, if there are any.

    Raises:
        UserError: They belong to another projector.
    """
    own = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    if weights and own != {name: tuple(tensor.shape) for name, tensor in weights.items()}:
        raise UserError(
            "the checkpoint's projector does not fit model.checkpoint; set model.checkpoint to that of the run"
        )
    module.load_state_dict(dict(weights), strict=bool(weights))
