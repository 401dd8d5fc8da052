"""Loading a language model, quantised or not, and preparing it for tuning."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from vlmcap.errors import UserError, first_line
from vlmcap.models.llm.attention import check_attention, choose_attention
from vlmcap.models.llm.experts import BLOCK
from vlmcap.models.llm.experts_quantization import check_experts_packed, expert_quantization

# Names of the language model's weights in a whole vision-language model's files, as published and as transformers 5
# writes them.
_OUT_OF_WHOLE = {
    r"^language_model\.model\.": "model.",
    r"^language_model\.lm_head\.": "lm_head.",
    r"^model\.language_model\.": "model.",
}


def quantization_config(kind: str, compute_dtype: torch.dtype) -> Any:
    """The bitsandbytes configuration of `kind`.

    NF4 with double quantisation for "4bit", LLM.int8() for "8bit", None for "none".

    Source: Dettmers et al., "QLoRA", https://arxiv.org/abs/2305.14314.
    """
    if kind == "none":
        return None
    from transformers import BitsAndBytesConfig

    if kind == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def load_language_model(
    folder: Path, *, dtype: torch.dtype, quantization: str, attention: str, device: str, is_on_host: bool = False
) -> nn.Module:
    """A causal language model with every parameter frozen.

    Args:
        folder: Checkpoint in Hugging Face layout; its own code is never run, and pickled weights may hold nothing but
            tensors. Of a whole vision-language model its language model is taken.
        dtype: Of unquantised weights, and of the arithmetic on quantised ones.
        quantization: "none", "8bit" or "4bit".
        attention: As `choose_attention` takes it.
        device: Where the model will run, such as "cpu" or "cuda:0"; its weights are put there while loading.
        is_on_host: Leaves unquantised weights in host memory, for a model that is cut into shards.

    Raises:
        UserError: The folder holds no causal language model, or only a part of one, or the attention is not to be had.
    """
    config, model_class, is_part = language_config(folder)
    chosen = choose_attention(attention, device, dtype, model_class)
    options: dict[str, Any] = {"config": config, "dtype": dtype, "attn_implementation": chosen}
    options["device_map"] = device_map(device, quantization, is_on_host=is_on_host)
    if is_part:
        options["key_mapping"] = _OUT_OF_WHOLE
    if quantization != "none":
        options["quantization_config"] = expert_quantization(folder, quantization_config(quantization, dtype))
    model, missing = _from_pretrained(model_class, folder, options)
    if missing:  # transformers would fill them with random numbers
        raise UserError(
            f"llm.checkpoint {folder} lacks {len(missing)} weights, first: {missing[0]}; take a whole checkpoint"
        )
    check_attention(model, chosen)
    if quantization == "4bit":
        keep_packing(model)
        check_experts_packed(model)
    return model.requires_grad_(False).eval()


def device_map(device: str, quantization: str, *, is_on_host: bool) -> dict[str, str]:
    """Where `from_pretrained` puts every weight as it is read, so that no second copy stands in host memory."""
    return {"": "cpu" if is_on_host and quantization == "none" else device}


def build_meta_language_model(folder: Path, *, dtype: torch.dtype, attention: str, device: str) -> nn.Module:
    """What `load_language_model` returns unquantised, with parameters and buffers on the meta device.

    No file of weights is opened.

    Args:
        folder: As for `load_language_model`, as are the others.
        dtype: Of the weights.
        attention: As `choose_attention` takes it.
        device: Where the model will run.

    Raises:
        UserError: The folder holds no causal language model.
    """
    config, model_class, _ = language_config(folder)
    chosen = choose_attention(attention, device, dtype, model_class)
    with torch.device("meta"):
        model: nn.Module = model_class._from_config(config, dtype=dtype, attn_implementation=chosen)
    return model.requires_grad_(False).eval()


def keep_packing(model: nn.Module) -> None:
    """Stops bitsandbytes from repacking 4-bit weights in place at the first inference on a CPU with bfloat16 products (AVX-512).

    What reads the weights afterwards (DoRA, a comparison with the base) would misread them.

    Raises:
        UserError: A layer's width is no multiple of the block of 64 weights: on the same CPUs, bitsandbytes 0.50
            unpacks it wrongly.
    """
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
            is_misread = module.weight.device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX512"
            if is_misread and module.in_features % BLOCK:
                raise UserError(
                    f"llm.quantization=4bit: bitsandbytes misreads layers of width {module.in_features}, which is no "
                    f"multiple of {BLOCK}, "
                    "on this CPU; set llm.quantization=none"
                )


def context_length(folder: Path) -> int:
    """Tokens that the model's positions reach, read from its configuration alone."""
    return int(_text_config(folder).max_position_embeddings)


def text_width(folder: Path) -> int:
    """Dl, the width of the language model's embeddings, read from its configuration alone."""
    return int(_text_config(folder).hidden_size)


def num_active_parameters(folder: Path) -> int:
    """Parameters that a token goes through, read from the configuration alone.

    No embeddings or head, of experts those it is sent to.
    """
    from transformers import AutoModel

    config = _text_config(folder)
    with torch.device("meta"):
        model: nn.Module = AutoModel.from_config(config)
    used = getattr(config, "num_experts_per_tok", 1) / (getattr(config, "num_experts", None) or 1)
    embeddings = model.get_input_embeddings().weight  # type: ignore[operator]
    counts = [
        parameter.numel() * (used if ".experts." in name else 1)
        for name, parameter in model.named_parameters()
        if parameter is not embeddings
    ]
    return round(sum(counts))


def _text_config(folder: Path) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder, trust_remote_code=False).get_text_config()


def language_config(folder: Path) -> tuple[Any, Any, bool]:
    """The language model's configuration, its class, and whether it is a part of a larger model.

    Raises:
        UserError: There is no such configuration, or no such class.
    """
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    try:
        whole = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, KeyError, OSError) as error:
        raise UserError(
            f"llm.checkpoint {folder} could not be loaded as a causal language model: {first_line(error)}"
        ) from error
    text = whole.get_text_config()
    try:
        return text, MODEL_FOR_CAUSAL_LM_MAPPING[type(text)], text is not whole
    except KeyError as error:
        raise UserError(
            f"llm.checkpoint {folder} holds no causal language model but a {text.model_type}; take another llm, or "
            "model= for a whole one"
        ) from error


def _from_pretrained(model_class: Any, folder: Path, options: dict[str, Any]) -> tuple[nn.Module, list[str]]:
    """The model and the names of the weights that it lacks."""
    from safetensors import SafetensorError

    try:
        model, loading = model_class.from_pretrained(folder, weights_only=True, output_loading_info=True, **options)
    except (pickle.UnpicklingError, EOFError) as error:  # torch's message would advise to run the code after all
        raise UserError(
            f"llm.checkpoint {folder} has a pytorch_model*.bin that holds more than tensors, or is broken, and was "
            "refused, as reading it "
            "could run foreign code; take a checkpoint with safetensors"
        ) from error
    except (ValueError, KeyError, OSError, ImportError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"llm.checkpoint {folder} could not be loaded as a causal language model: {first_line(error)}"
        ) from error
    return cast(nn.Module, model), sorted(loading["missing_keys"])
