"""Adapters folded into the language model's own weights, for programs that know no adapters.

Merging goes onto the unquantised base: in 4 bit the rounding would eat the adapters (https://github.com/huggingface/peft/issues/2321).
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vlmcap.errors import UserError
from vlmcap.models.llm.experts_lora import merge_expert_lora
from vlmcap.models.llm.load import load_language_model

_PROBE = 32  # tokens that logits are compared on
_COPIED = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model", "chat_template*")


def merge_adapters(
    base_folder: Path,
    weights: Mapping[str, Tensor],
    output: Path,
    *,
    adapt: Callable[[nn.Module], nn.Module],
    dtype: torch.dtype = torch.bfloat16,
) -> float:
    """The difference of logits before and after the merge, as `merge` gives it; the merged model is in `output`, whole or not at all.

    Args:
        base_folder: The language model that the adapters were trained on, unquantised, in Hugging Face layout.
        weights: Adapters by name, such as a checkpoint's state; what is no adapter of the language model is passed over.
        output: A new folder in Hugging Face layout with the tokenizer of the base.
        adapt: Puts adapters on the base as in training, such as a call of `add_lora` with the run's settings.
        dtype: Of the merged weights.

    Raises:
        UserError: The output is there already, base and adapters do not fit, or the merged model does not give the same logits.
    """
    if output.exists():
        raise UserError(f"{output} is there already; name a new folder for the merged model")
    model = load_language_model(base_folder, dtype=dtype, quantization="none", attention="sdpa", device="cpu")
    refuse_quantized(model)
    adapted = adapt(model)
    load_adapters(adapted, weights)
    merged, difference = merge(adapted)
    partial = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        _save(merged, base_folder, partial)
        partial.rename(output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return difference


@torch.no_grad()
def merge(adapted: Any) -> tuple[nn.Module, float]:
    """The model without adapters but with their effect, and by how much its logits differ: ||after - before|| / ||before||.

    Args:
        adapted: As `add_lora` returns it; changed in place.

    Raises:
        UserError: The model is quantised, or the difference is above 1e-4 in float32, 5e-2 in 16 bit.
    """
    refuse_quantized(adapted)
    adapted.eval()
    ids = torch.linspace(0, adapted.config.get_text_config().vocab_size - 1, _PROBE).long()[None]
    before = adapted(input_ids=ids).logits.float()
    merge_expert_lora(adapted)
    merged: nn.Module = adapted.merge_and_unload(safe_merge=True)
    after = merged(input_ids=ids).logits.float()
    difference = float((after - before).norm() / before.norm())
    tolerance = 1e-4 if next(merged.parameters()).dtype == torch.float32 else 5e-2
    if not difference <= tolerance:  # nan is no number below
        raise UserError(
            f"the merged model's logits differ from those with adapters by {difference:.1e} (at most {tolerance:.0e}): not saved"
        )
    return merged, difference


def load_adapters(adapted: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Puts saved adapters in the places of fresh ones.

    Raises:
        UserError: One is missing, left over or of another shape.
    """
    own = {name: tensor for name, tensor in adapted.state_dict().items() if "lora_" in name}
    names = {name: name.removeprefix("captioner.").removeprefix("llm.") for name in weights if "lora_" in name}
    saved = {short: weights[name] for name, short in names.items() if not short.startswith(("encoder.", "projector."))}
    for name in sorted(own.keys() ^ saved.keys()):
        where = "has no place in the model" if name in saved else "is not among the saved ones"
        raise UserError(f"adapter {name} {where}; tuning.lora and llm.checkpoint must be those of the run")
    for name, tensor in own.items():
        if tensor.shape != saved[name].shape:
            raise UserError(
                f"adapter {name} is {tuple(saved[name].shape)}, not {tuple(tensor.shape)}; tuning.lora.rank must be that of the run"
            )
    adapted.load_state_dict(saved, strict=False)


def refuse_quantized(model: nn.Module) -> None:
    """Nothing, if all weights are stored as numbers that can be added to.

    Raises:
        UserError: Some are quantised.
    """
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point() or hasattr(parameter, "quant_state"):
            raise UserError(f"adapters cannot be merged into quantised weights ({name}); merge onto the base with llm.quantization=none")


def _save(merged: Any, base_folder: Path, folder: Path) -> None:
    """Weights, configuration and what belongs to the tokenizer."""
    from transformers import GenerationConfig

    # Some published settings, such as Vicuna's, contradict themselves: transformers reads but does not write them.
    merged.generation_config = GenerationConfig.from_model_config(merged.config)
    merged.save_pretrained(folder)
    for pattern in (*_COPIED, "generation_config.json"):
        for file in base_folder.glob(pattern):
            shutil.copyfile(file, folder / file.name)
