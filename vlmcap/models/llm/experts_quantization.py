"""4-bit experts while loading, and how many bytes that saves.

transformers builds a model without weights, lets its quantiser exchange modules, and then reads tensor by tensor;
per-expert tensors of the hub's files are fused a layer at a time. So a quantiser that knows experts is all it takes:
never is more than a layer unpacked.
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
    """`config` (transformers' BitsAndBytesConfig), changed so that the experts of the model in `folder`, if it has any, are quantised too.

    Raises:
        UserError: Experts and 8 bit: bitsandbytes has no such storage for them; or transformers is too old for experts
            in 4 bits.
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
    """Nothing, if every expert's weight is in 4 bit or the model has no experts.

    Raises:
        UserError: Naming the first weight that is not.
    """
    _refuse_unless(is_packed, model)


def four_bit_bytes(model: nn.Module, dtype: torch.dtype) -> int:
    """Bytes of the parameters of `model`, weightless or not, once its linear layers and experts are in 4 bit and the rest in `dtype`.

    Left out are bitsandbytes' tables of constants, about 1 KB a matrix.

    Args:
        model: transformers' causal language model, not quantised.
        dtype: Of what stays unquantised: embeddings, head, norms, router.
    """
    from transformers.quantizers.base import get_keys_to_not_convert

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
            scales = -(-count // BLOCK)
            total += -(-count // 2) + scales + 4 * -(-scales // SCALE_BLOCK)
        else:
            total += count * dtype.itemsize
    return total


def _refuse_unless(is_reached: Callable[[Tensor], bool], model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if ".experts." in name and "lora_" not in name and parameter.ndim > 1 and not is_reached(parameter):
            raise UserError(
                f"llm.quantization=4bit does not reach the experts of this model ({name}); set llm.quantization=none"
            )


@cache
def _register() -> str:
    """The name under which transformers now knows a quantiser that does everything as its 4-bit one, and the experts too."""
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
            if weight.shape != (
                expected := context["model"].get_parameter(name).shape
            ):  # transformers looks at unpacked ones only
                raise ValueError(f"{name} is {tuple(weight.shape)} in the files and {tuple(expected)} in the model")
            return {name: pack_experts(weight)}

    class ExpertQuantizer(Bnb4BitHfQuantizer):
        def _process_model_before_weight_loading(self, model: Any, *args: Any, **options: Any) -> None:
            super()._process_model_before_weight_loading(model, *args, **options)
            replace_experts(model, to_pack=True)
            _refuse_unless(lambda weight: isinstance(weight, Params4bit), model)  # before anything is read

        def param_needs_quantization(self, model: Any, param_name: str, **options: Any) -> bool:
            return holds_experts(model, param_name) or super().param_needs_quantization(model, param_name, **options)

        def get_quantize_ops(self) -> Any:
            return Pack(super().get_quantize_ops())

        def _process_model_after_weight_loading(self, model: Any, **options: Any) -> Any:
            # From here on it is a model like any other of bitsandbytes, to peft among others.
            self.quantization_config.quant_method = model.quantization_method = QuantizationMethod.BITS_AND_BYTES
            return super()._process_model_after_weight_loading(model, **options)

        def is_serializable(self) -> bool:
            return False  # no other program could read the packed experts

    register_quantizer("vlmcap_experts_4bit")(ExpertQuantizer)
    return "vlmcap_experts_4bit"
