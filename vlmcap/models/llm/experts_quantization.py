"""Quantises experts to 4 bits while a model is loaded, and computes the size of a 4-bit model.

transformers builds a model on the meta device, lets its quantiser replace modules, and then loads tensor by tensor,
fusing the per-expert tensors of published files one layer at a time. A quantiser that supports experts is therefore
enough, and at most one layer is unpacked at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vlmcap.errors import UserError
from vlmcap.models.llm.experts import (
    BLOCK,
    SCALE_BLOCK,
    FusedExperts,
    is_packed,
    pack_experts,
    replace_experts,
    stock_experts,
)
from vlmcap.models.versions import check_transformers


def expert_quantization(folder: Path, config: Any) -> Any:
    """Extends a quantisation configuration to the experts of a model, if it has any.

    Args:
        folder: Checkpoint in Hugging Face layout.
        config: transformers' BitsAndBytesConfig; modified in place and returned.

    Raises:
        UserError: The model has experts, and 8-bit quantisation is requested or transformers is too old.
    """
    from transformers import AutoConfig

    text = AutoConfig.from_pretrained(folder, trust_remote_code=False).get_text_config()
    if not any(getattr(text, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts")):
        return config
    check_transformers("quantised experts")
    if config.load_in_8bit:
        raise UserError(
            f"llm.quantization=8bit would leave the experts of {folder} in 16 bit; set llm.quantization=4bit"
        )
    config.quant_method = _register()
    return config


def check_experts_packed(model: nn.Module) -> None:
    """Checks that the weights of all experts are in 4 bits.

    Raises:
        UserError: A weight is not in 4 bits.
    """
    _check_experts(is_packed, model)


def four_bit_bytes(model: nn.Module, dtype: torch.dtype) -> int:
    """Returns the bytes of a model's parameters with linear layers and experts in 4 bits, and the rest in `dtype`.

    bitsandbytes' constant tables, about 1 KB per matrix, are not included.

    Args:
        model: Unquantised causal language model of transformers, possibly on the meta device.
        dtype: Dtype of unquantised parameters: embeddings, head, norms, router.
    """
    from transformers.quantizers.base import get_keys_to_not_convert

    # transformers leaves some layers in 16 bits, such as the head.
    kept = set(get_keys_to_not_convert(model))
    linear = {
        id(module.weight)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name not in kept
    }
    experts = {id(weight) for _, module in stock_experts(model) for weight in module.parameters()}
    total = 0
    for parameter in model.parameters():
        count = parameter.numel()
        if id(parameter) in linear | experts:
            # Two weights per byte, a byte per block of 64 weights, and four bytes per 256 of those.
            scales = -(-count // BLOCK)
            total += -(-count // 2) + scales + 4 * -(-scales // SCALE_BLOCK)
        else:
            total += count * dtype.itemsize
    return total


def _check_experts(is_quantized: Callable[[Tensor], bool], model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if ".experts." in name and "lora_" not in name and parameter.ndim > 1 and not is_quantized(parameter):
            raise UserError(
                f"llm.quantization=4bit does not support the experts of this model ({name}); set llm.quantization=none"
            )


@cache
def _register() -> str:
    """Registers a 4-bit quantiser that supports experts with transformers, and returns its name."""
    from bitsandbytes.nn import Params4bit
    from transformers.core_model_loading import ConversionOps
    from transformers.quantizers.auto import register_quantizer
    from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
    from transformers.utils.quantization_config import QuantizationMethod

    def holds_experts(model: nn.Module, parameter: str) -> bool:
        return isinstance(model.get_submodule(parameter.rpartition(".")[0]), FusedExperts)

    class Pack(ConversionOps):
        def __init__(self, linear: Any) -> None:
            self.linear = linear

        def convert(self, input_dict: dict[str, Any], **context: Any) -> dict[str, Tensor]:
            (name, value) = next(iter(input_dict.items()))
            if not holds_experts(context["model"], name):
                return self.linear.convert(input_dict, **context)
            weight = value[0] if isinstance(value, list) else value
            expected = context["model"].get_parameter(name).shape
            if weight.shape != expected:  # transformers checks the shapes of unpacked tensors only
                raise ValueError(f"{name} is {tuple(weight.shape)} in the files and {tuple(expected)} in the model")
            return {name: pack_experts(weight)}

    class ExpertQuantizer(Bnb4BitHfQuantizer):
        def _process_model_before_weight_loading(self, model: Any, *args: Any, **options: Any) -> None:
            super()._process_model_before_weight_loading(model, *args, **options)
            replace_experts(model, to_pack=True)
            _check_experts(lambda weight: isinstance(weight, Params4bit), model)  # before any weight is read

        def param_needs_quantization(self, model: Any, param_name: str, **options: Any) -> bool:
            return holds_experts(model, param_name) or super().param_needs_quantization(model, param_name, **options)

        def get_quantize_ops(self) -> Any:
            return Pack(super().get_quantize_ops())

        def _process_model_after_weight_loading(self, model: Any, **options: Any) -> Any:
            # From here on, peft and others treat it as a bitsandbytes model.
            self.quantization_config.quant_method = model.quantization_method = QuantizationMethod.BITS_AND_BYTES
            return super()._process_model_after_weight_loading(model, **options)

        def is_serializable(self) -> bool:
            return False  # no other program can read packed experts

    register_quantizer("vlmcap_experts_4bit")(ExpertQuantizer)
    return "vlmcap_experts_4bit"
