"""A whole pretrained model with its training folded in, put together again for programs that know the stock classes."""

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

# Our projector's layers in the class of transformers.
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
    """The whole model in its class of transformers, on the CPU, and the difference of logits that `merge` gives.

    0 without adapters.

    Args:
        kind: As `load_pretrained` takes it.
        folder: Checkpoint that the run was trained on, unquantised.
        weights: A checkpoint's state: projector, adapters, or the language part's own weights.
        adapt: Puts adapters on the language part as in training; None where there are none.
        dtype: Of the merged weights.
        device: Where the arithmetic is done; it has to hold the language part.
        progress: Called with layers merged and layers in all.

    Raises:
        UserError: The folder cannot be loaded, or the weights do not fit it.
    """
    projector = {
        n.removeprefix("captioner.projector."): t for n, t in weights.items() if n.startswith("captioner.projector.")
    }
    if kind == "llava_next_video":
        whole, language = _load_llava(folder, dtype)
        _put_projector(
            whole.model.multi_modal_projector, {_llava_name(name): tensor for name, tensor in projector.items()}
        )
    else:
        whole = language = _load_qwen(kind, folder, dtype, projector)
    refuse_quantized(whole)
    # A tower is neither needed nor wanted among the layers that adapters go on.
    visual = _take_visual(whole)
    difference = 0.0
    if adapt is None:
        load_unadapted_weights(language, weights)
    else:
        adapted = adapt(language.to(device))
        load_adapters(adapted, weights)
        _, difference = merge(adapted, progress)  # its layers are the whole model's, so the whole model has them too
    whole.to("cpu")
    if visual is not None:
        whole.model.visual = visual
    return whole, difference


def _load_qwen(kind: str, folder: Path, dtype: torch.dtype, projector: Mapping[str, Tensor]) -> Any:
    """The model with its tower, and the trained mergers in it."""
    parts = load_qwen_vl(
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
    _put_projector(parts.projector, projector)
    whole: Any = parts.llm
    tower: Any = parts.encoder.tower
    first, *deep = parts.projector.mergers
    tower.merger = first
    if deep:
        tower.deepstack_merger_list = nn.ModuleList(deep)
    whole.model.visual = tower.to(dtype)
    return whole


def _load_llava(folder: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """The model, and a causal language model that shares its layers."""
    import transformers

    model_class = transformers.LlavaNextVideoForConditionalGeneration
    whole = read_model(model_class, "llava_next_video", folder, dtype=dtype, attn_implementation="sdpa")
    with torch.device("meta"):
        language = transformers.AutoModelForCausalLM.from_config(whole.config.text_config, dtype=dtype)
    language.model, language.lm_head = whole.model.language_model, whole.lm_head
    return whole.requires_grad_(False).eval(), language.requires_grad_(False).eval()


def _take_visual(whole: Any) -> Any:
    """Takes Qwen's tower out of the model, as in training; LLaVA's is no part of what is adapted."""
    visual = getattr(whole.model, "visual", None)
    if visual is not None:
        whole.model.visual = None
    return visual


def _llava_name(name: str) -> str:
    layer, _, leaf = name.rpartition(".")
    return f"{_LLAVA_PROJECTOR.get(layer, layer)}.{leaf}"


def _put_projector(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Puts trained weights in the projector's places; nothing where none were trained.

    Raises:
        UserError: They are not those of this projector.
    """
    own = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    if weights and own != {name: tuple(tensor.shape) for name, tensor in weights.items()}:
        raise UserError(
            "the checkpoint's projector is not that of model.checkpoint; model.checkpoint must be the run's"
        )
    module.load_state_dict(dict(weights), strict=bool(weights))
