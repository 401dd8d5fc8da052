"""Merges adapters into the language model's weights, for programs that do not support adapters.

The base checkpoint is loaded unquantised, because rounding to 4 bits would remove the effect of the adapters
(https://github.com/huggingface/peft/issues/2321).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vlmcap.errors import UserError
from vlmcap.models.llm.experts import is_router, merge_expert_lora
from vlmcap.models.llm.load import load_language_model

SHARD_SIZE = "4GB"
_NUM_PROBE_TOKENS = 32  # tokens whose logits are compared before and after merging
Progress = Callable[[int, int], None]
_COPIED = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "chat_template*",
)


def merged_model(
    base_folder: Path,
    weights: Mapping[str, Tensor],
    *,
    adapt: Callable[[nn.Module], nn.Module] | None,
    dtype: torch.dtype,
    device: str = "cpu",
    progress: Progress | None = None,
) -> tuple[nn.Module, float]:
    """Loads a language model with its trained weights merged.

    Memory holds one copy of the weights, as adapters are merged in place.

    Args:
        base_folder: Unquantised base checkpoint of the adapters, in Hugging Face layout.
        weights: Adapters by name, such as the state of a checkpoint, or trained weights of the language model itself;
            other tensors are ignored.
        adapt: Adds adapters to the base checkpoint as in training, such as `add_lora` with the run's settings; None
            without adapters.
        dtype: Dtype of the merged weights.
        device: Device of the merge, such as "cuda:0"; it must have room for the model.
        progress: Callback `(merged_layers, total_layers)`.

    Returns:
        The model on the CPU, and the relative difference of logits from `merge`, 0 without adapters.

    Raises:
        UserError: The adapters do not fit, or the merged model gives other logits.
    """
    # Without adapters nothing is computed, so the weights stay on the host.
    load_device = "cpu" if adapt is None else device
    model = load_language_model(base_folder, dtype=dtype, quantization="none", attention="sdpa", device=load_device)
    refuse_quantized(model)
    if adapt is None:
        load_unadapted_weights(model, weights)
        return model, 0.0
    adapted = adapt(model)
    load_adapters(adapted, weights)
    merged, difference = merge(adapted, progress)
    return merged.to("cpu"), difference


@torch.no_grad()
def merge(adapted: Any, progress: Progress | None = None) -> tuple[nn.Module, float]:
    """Merges the adapters of a model and removes them.

    Args:
        adapted: Model from `add_lora`; modified in place.
        progress: Callback `(merged_layers, total_layers)`.

    Returns:
        The model without adapters, and the relative difference of its logits, ||after - before|| / ||before||, with the
        same routing to experts in both runs.

    Raises:
        UserError: The model is quantised, or the difference exceeds 1e-4 in float32 or 5e-2 in 16 bits.
    """
    refuse_quantized(adapted)
    adapted.eval()
    weight = next(adapted.parameters())
    ids = (
        # Ids from the whole vocabulary, as the probe needs no meaning.
        torch.linspace(0, adapted.config.get_text_config().vocab_size - 1, _NUM_PROBE_TOKENS)
        .long()[None]
        .to(weight.device)
    )
    # A merged layer differs by rounding errors, which could send a token to other experts.
    routing = Routing(adapted)
    with routing.recorded():
        before = adapted(input_ids=ids).logits.float()
    merge_layers(adapted, progress)
    merged: nn.Module = adapted.unload()
    with routing.replayed():
        after = merged(input_ids=ids).logits.float()
    difference = float((after - before).norm() / before.norm())
    # Relative to the norm of the logits; 16-bit weights keep 8 to 11 significant bits.
    tolerance = 1e-4 if weight.dtype == torch.float32 else 5e-2
    if not difference <= tolerance:  # also true for NaN
        raise UserError(
            f"the merged model is not saved, as its logits differ from those with adapters by {difference:.1e} (at "
            f"most {tolerance:.0e})"
        )
    return merged, difference


class Routing:
    """Records the routing of tokens to experts in one run and replays it in another, for a comparison of outputs.

    A rounding error may swap two almost equal experts and change the token's output with them, so outputs in 16 bits
    are comparable only with the same routing. The routers, which never have adapters, must be the same modules in both
    runs.

    Args:
        model: Causal language model, with or without adapters and experts.
    """

    def __init__(self, model: nn.Module) -> None:
        self.routers = [module for name, module in model.named_modules() if is_router(model, name, module)]
        self._outputs: dict[nn.Module, Any] = {}

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Records the routers' outputs in one forward pass."""

        def keep(router: nn.Module, _: Any, output: Any) -> None:
            self._outputs[router] = output

        handles = [router.register_forward_hook(keep) for router in self.routers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Replaces the routers' outputs by the recorded ones, for the same tokens."""
        handles = [router.register_forward_hook(lambda module, _, __: self._outputs[module]) for router in self.routers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def merge_layers(adapted: Any, progress: Progress | None = None) -> None:
    """Adds the adapters to their base weights, layer by layer, with extra memory for a single layer only."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    # Experts are adapted by this package, all other layers by peft.
    merge_expert_lora(adapted)
    layers = [module for module in adapted.modules() if isinstance(module, BaseTunerLayer)]
    for done, layer in enumerate(layers, 1):
        layer.merge(safe_merge=True)
        if progress is not None:
            progress(done, len(layers))


@contextmanager
def adapters_for_inference(llm: nn.Module, *, is_merged: bool) -> Iterator[None]:
    """Speeds up LoRA in inference inside the context; afterwards, all parameters are the original objects again.

    Adapters are merged into copies of their base weights if these are unquantised. Other adapters are cast to the
    autocast dtype once, instead of in each call.

    Args:
        llm: Language model, with or without adapters.
        is_merged: Whether there is memory for the copies.
    """
    # Under autocast, every step would cast the float32 factors again, so they are cast once.
    dtype = torch.get_autocast_dtype(next(llm.parameters()).device.type)
    is_cast = torch.is_autocast_enabled(next(llm.parameters()).device.type)
    originals: list[tuple[nn.Module, nn.Parameter]] = []
    merged: list[Any] = []

    def replace_weight(module: Any, make: Callable[[Tensor], Tensor]) -> None:
        originals.append((module, module.weight))
        module._parameters["weight"] = nn.Parameter(make(module.weight.detach()), requires_grad=False)

    try:
        for layer in _adapted_layers(llm):
            if is_merged and is_mergeable(layer):
                # peft merges in place, so it gets a copy, which is dropped at the end.
                replace_weight(layer.get_base_layer(), torch.clone)
                with torch.autocast(layer.weight.device.type, enabled=False):
                    layer.merge()
                merged.append(layer)
            elif is_cast and not _is_sharded(layer):
                for factor in (*layer.lora_A.values(), *layer.lora_B.values()):
                    replace_weight(factor, lambda weight: weight.to(dtype))
        yield
    finally:
        for layer in merged:
            layer.merged_adapters.clear()
        for module, parameter in reversed(originals):
            module._parameters["weight"] = parameter


def _adapted_layers(llm: nn.Module) -> list[Any]:
    """Returns the layers with LoRA, without DoRA, which is not a sum."""
    if not hasattr(llm, "peft_config"):
        return []
    from peft.tuners.lora import LoraLayer

    return [module for module in llm.modules() if isinstance(module, LoraLayer) and not module.lora_variant]


def is_mergeable(layer: Any) -> bool:
    """Returns whether adapters can be added to the base weights of a layer: they are neither quantised nor sharded."""
    weight = layer.get_base_layer().weight
    return weight.is_floating_point() and not hasattr(weight, "quant_state") and not _is_sharded(layer)


def _is_sharded(layer: Any) -> bool:
    from torch.distributed.tensor import DTensor

    return any(isinstance(parameter, DTensor) for parameter in layer.parameters())


def load_adapters(adapted: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Loads saved adapters into a model with new ones.

    Raises:
        UserError: An adapter is missing, unexpected or of another shape.
    """
    adapters = {name: tensor for name, tensor in adapted.state_dict().items() if "lora_" in name}
    names = {name: name.removeprefix("captioner.").removeprefix("llm.") for name in weights if "lora_" in name}
    # Adapters of the encoder and of the projector are not merged here.
    saved = {short: weights[name] for name, short in names.items() if not short.startswith(("encoder.", "projector."))}
    for name in sorted(adapters.keys() ^ saved.keys()):
        problem = "has no place in the model" if name in saved else "is missing in the checkpoint"
        raise UserError(f"adapter {name} {problem}; set tuning.lora and llm.checkpoint to those of the run")
    for name, tensor in adapters.items():
        if tensor.shape != saved[name].shape:
            raise UserError(
                f"adapter {name} has the shape {tuple(saved[name].shape)}, not {tuple(tensor.shape)}; set "
                "tuning.lora.rank to that of the run"
            )
    adapted.load_state_dict(saved, strict=False)


def load_unadapted_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Loads trained weights of the language model itself, if there are any.

    Raises:
        UserError: A weight is unexpected or of another shape.
    """
    saved = {
        name.removeprefix("captioner.llm."): tensor
        for name, tensor in weights.items()
        if name.startswith("captioner.llm.")
    }
    state = model.state_dict()
    for name, tensor in saved.items():
        if name not in state or state[name].shape != tensor.shape:
            raise UserError(
                f"the trained weight {name} {tuple(tensor.shape)} has no place in the model; set llm.checkpoint to "
                "that of the run"
            )
    model.load_state_dict(saved, strict=False)


def refuse_quantized(model: nn.Module) -> None:
    """Checks that all weights are unquantised.

    Raises:
        UserError: A weight is quantised.
    """
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point() or hasattr(parameter, "quant_state"):
            raise UserError(
                f"adapters cannot be merged into quantised weights ({name}); load the base checkpoint with "
                "llm.quantization=none"
            )


def save_merged(merged: Any, base_folder: Path, folder: Path, beside: Sequence[str] = ()) -> None:
    """Writes weights, configuration and tokenizer files.

    Args:
        merged: Model in its transformers class.
        base_folder: Folder that the tokenizer is copied from.
        folder: Folder to write to.
        beside: Patterns of further files to copy.
    """
    from transformers import GenerationConfig

    # Some published generation settings, such as Vicuna's, are contradictory: transformers loads but does not save
    # them.
    merged.generation_config = GenerationConfig.from_model_config(merged.config)
    merged.save_pretrained(folder, max_shard_size=SHARD_SIZE)
    for pattern in (*_COPIED, "generation_config.json", *beside):
        for file in base_folder.glob(pattern):
            shutil.copyfile(file, folder / file.name)
