"""Adapters folded into the language model's own weights, for programs that know no adapters.

Merging goes onto the unquantised base: in 4 bit the rounding would eat the adapters
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
from vlmcap.files import new_folder
from vlmcap.models.llm.experts import is_router, merge_expert_lora
from vlmcap.models.llm.load import load_language_model

SHARD_SIZE = "4GB"
_PROBE = 32  # tokens that logits are compared on
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


def merge_adapters(
    base_folder: Path,
    weights: Mapping[str, Tensor],
    output: Path,
    *,
    adapt: Callable[[nn.Module], nn.Module],
    dtype: torch.dtype = torch.bfloat16,
) -> float:
    """The difference of logits before and after the merge, as `merge` gives it.

    The merged model is in `output`, whole or not at all.

    Args:
        base_folder: The language model that the adapters were trained on, unquantised, in Hugging Face layout.
        weights: Adapters by name, such as a checkpoint's state; what is no adapter of the language model is passed
            over.
        output: A new folder in Hugging Face layout with the tokenizer of the base.
        adapt: Puts adapters on the base as in training, such as a call of `add_lora` with the run's settings.
        dtype: Of the merged weights.

    Raises:
        UserError: The output is there already, base and adapters do not fit, or the merged model does not give the same
            logits.
    """
    if output.exists():
        raise UserError(f"{output} is there already; name a new folder for the merged model")
    merged, difference = merged_model(base_folder, weights, adapt=adapt, dtype=dtype)
    with new_folder(output) as partial:
        save_merged(merged, base_folder, partial)
    return difference


def merged_model(
    base_folder: Path,
    weights: Mapping[str, Tensor],
    *,
    adapt: Callable[[nn.Module], nn.Module] | None,
    dtype: torch.dtype,
    device: str = "cpu",
    progress: Progress | None = None,
) -> tuple[nn.Module, float]:
    """The language model with its training folded in, on the CPU, and the difference of logits that `merge` gives.

    0 without adapters.

    One copy of the weights is held: the base is read once, and each layer takes its adapters in where it stands.

    Args:
        base_folder: As for `merge_adapters`.
        weights: As for `merge_adapters`; where the language model's own weights were trained, these.
        adapt: As for `merge_adapters`; None where there are no adapters.
        dtype: Of the merged weights.
        device: Where the arithmetic is done, such as "cuda:0"; it has to hold the whole model.
        progress: Called with layers merged and layers in all.

    Raises:
        UserError: As `merge_adapters`.
    """
    place = "cpu" if adapt is None else device
    model = load_language_model(base_folder, dtype=dtype, quantization="none", attention="sdpa", device=place)
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
    """The model without adapters but with their effect, and by how much its logits differ.

    ||after - before|| / ||before||.

    Where there are experts, both sides send each token to the same ones.

    Args:
        adapted: As `add_lora` returns it; changed in place.
        progress: Called with layers merged and layers in all.

    Raises:
        UserError: The model is quantised, or the difference is above 1e-4 in float32, 5e-2 in 16 bit.
    """
    refuse_quantized(adapted)
    adapted.eval()
    weight = next(adapted.parameters())
    ids = torch.linspace(0, adapted.config.get_text_config().vocab_size - 1, _PROBE).long()[None].to(weight.device)
    routing = Routing(adapted)
    with routing.recorded():
        before = adapted(input_ids=ids).logits.float()
    fold_in(adapted, progress)
    merged: nn.Module = adapted.unload()
    with routing.replayed():
        after = merged(input_ids=ids).logits.float()
    difference = float((after - before).norm() / before.norm())
    tolerance = 1e-4 if weight.dtype == torch.float32 else 5e-2
    if not difference <= tolerance:  # nan is no number below
        raise UserError(
            f"the merged model's logits differ from those with adapters by {difference:.1e} (at most "
            f"{tolerance:.0e}): not saved"
        )
    return merged, difference


class Routing:
    """The choice of experts, kept from one run of a model for the next.

    The routers must be the same modules in both runs.

    Two almost equal experts change places by a rounding error, and the token's output with them; a comparison of two
    sets of weights in 16 bit says something only where both send each token to the same experts.

    Args:
        model: Causal language model, with or without adapters, which routers never have; one without experts has no
            routers.
    """

    def __init__(self, model: nn.Module) -> None:
        self.routers = [module for name, module in model.named_modules() if is_router(model, name, module)]
        self._outputs: dict[nn.Module, Any] = {}

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Keeps what the routers give in one forward pass."""

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
        """Puts what was kept in the place of what the routers give, for the same tokens."""
        handles = [router.register_forward_hook(lambda module, _, __: self._outputs[module]) for router in self.routers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def fold_in(adapted: Any, progress: Progress | None = None) -> None:
    """Adds the adapters to the weights beside them, layer by layer; only what a single layer needs is held twice."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    merge_expert_lora(adapted)
    layers = [module for module in adapted.modules() if isinstance(module, BaseTunerLayer)]
    for done, layer in enumerate(layers, 1):
        layer.merge(safe_merge=True)
        if progress is not None:
            progress(done, len(layers))


@contextmanager
def adapters_for_inference(llm: nn.Module, *, is_merged: bool) -> Iterator[None]:
    """Within it, LoRA takes fewer kernels per token.

    Afterwards all parameters are the very objects that they were before.

    Adapters are added to copies of the weights beside them, where those are stored as plain numbers. All others are
    held in the type that autocast computes in, to which it would convert them at each call.

    Args:
        llm: The language model, with or without adapters.
        is_merged: Whether there is memory for the copies.
    """
    dtype = torch.get_autocast_dtype(next(llm.parameters()).device.type)
    is_cast = torch.is_autocast_enabled(next(llm.parameters()).device.type)
    kept: list[tuple[nn.Module, nn.Parameter]] = []
    merged: list[Any] = []

    def exchange(module: Any, make: Callable[[Tensor], Tensor]) -> None:
        kept.append((module, module.weight))
        module._parameters["weight"] = nn.Parameter(make(module.weight.detach()), requires_grad=False)

    try:
        for layer in _adapted_layers(llm):
            if is_merged and is_mergeable(layer):
                exchange(layer.get_base_layer(), torch.clone)
                with torch.autocast(layer.weight.device.type, enabled=False):
                    layer.merge()
                merged.append(layer)
            elif is_cast and not _is_sharded(layer):
                for factor in (*layer.lora_A.values(), *layer.lora_B.values()):
                    exchange(factor, lambda weight: weight.to(dtype))
        yield
    finally:
        for layer in merged:
            layer.merged_adapters.clear()
        for module, parameter in reversed(kept):
            module._parameters["weight"] = parameter


def _adapted_layers(llm: nn.Module) -> list[Any]:
    """The layers with LoRA on them; DoRA's, whose effect is no sum, are left as they are."""
    if not hasattr(llm, "peft_config"):
        return []
    from peft.tuners.lora import LoraLayer

    return [module for module in llm.modules() if isinstance(module, LoraLayer) and not module.lora_variant]


def is_mergeable(layer: Any) -> bool:
    """Whether the adapters of a layer can be added to its weights.

    They are plain numbers, all of them on this device.
    """
    weight = layer.get_base_layer().weight
    return weight.is_floating_point() and not hasattr(weight, "quant_state") and not _is_sharded(layer)


def _is_sharded(layer: Any) -> bool:
    from torch.distributed.tensor import DTensor

    return any(isinstance(parameter, DTensor) for parameter in layer.parameters())


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
                f"adapter {name} is {tuple(saved[name].shape)}, not {tuple(tensor.shape)}; tuning.lora.rank must be "
                "that of the run"
            )
    adapted.load_state_dict(saved, strict=False)


def load_unadapted_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Puts trained weights of the language model itself in the places of the base's; nothing where none were trained.

    Raises:
        UserError: One has no place in the model, or another shape.
    """
    saved = {
        name.removeprefix("captioner.llm."): tensor
        for name, tensor in weights.items()
        if name.startswith("captioner.llm.")
    }
    own = model.state_dict()
    for name, tensor in saved.items():
        if name not in own or own[name].shape != tensor.shape:
            raise UserError(
                f"the trained weight {name} {tuple(tensor.shape)} has no place in the model; llm.checkpoint must be "
                "the run's"
            )
    model.load_state_dict(saved, strict=False)


def refuse_quantized(model: nn.Module) -> None:
    """Nothing, if all weights are stored as numbers that can be added to.

    Raises:
        UserError: Some are quantised.
    """
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point() or hasattr(parameter, "quant_state"):
            raise UserError(
                f"adapters cannot be merged into quantised weights ({name}); merge onto the base with "
                "llm.quantization=none"
            )


def save_merged(merged: Any, base_folder: Path, folder: Path, beside: Sequence[str] = ()) -> None:
    """Writes weights, configuration and what belongs to the tokenizer.

    Args:
        merged: In its class of transformers.
        base_folder: Where the tokenizer is copied from.
        folder: Where to write.
        beside: Patterns of further files to copy.
    """
    from transformers import GenerationConfig

    # Some published settings, such as Vicuna's, contradict themselves: transformers reads but does not write them.
    merged.generation_config = GenerationConfig.from_model_config(merged.config)
    merged.save_pretrained(folder, max_shard_size=SHARD_SIZE)
    for pattern in (*_COPIED, "generation_config.json", *beside):
        for file in base_folder.glob(pattern):
            shutil.copyfile(file, folder / file.name)
