"""Loads language models, with or without quantisation."""

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

# Prefixes of the language model's weights in a pretrained VLM, in published files and in those that transformers 5
# writes.
_LLM_KEYS = {
    r"^(?:model\.)?language_model\.model\.": "model.",
    r"^(?:model\.)?language_model\.lm_head\.": "lm_head.",
    r"^model\.(?:language|text)_model\.": "model.",
}


def quantization_config(kind: str, compute_dtype: torch.dtype) -> Any:
    """Returns the bitsandbytes configuration of a kind of quantisation.

    "4bit" is NF4 with double quantisation (Dettmers et al., QLoRA, https://arxiv.org/abs/2305.14314), "8bit" is
    LLM.int8(), and for "none" it is None.
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
    """Loads a causal language model with all parameters frozen.

    Args:
        folder: Checkpoint in Hugging Face layout; its own code is never run, and pickled weights may contain only
            tensors. From a pretrained VLM, the language model is loaded.
        dtype: Dtype of unquantised weights, and of the arithmetic on quantised ones.
        quantization: "none", "8bit" or "4bit".
        attention: Requested attention, as for `choose_attention`.
        device: Device that the model will run on, such as "cpu" or "cuda:0"; weights are loaded to it.
        is_on_host: Whether unquantised weights stay in host memory, for a model that will be sharded.

    Raises:
        UserError: The folder holds no causal language model, or an incomplete one, or the attention cannot run here.
    """
    config, model_class, is_part = language_config(folder)
    chosen = choose_attention(attention, device, dtype, model_class)
    options: dict[str, Any] = {"config": config, "dtype": dtype, "attn_implementation": chosen}
    options["device_map"] = device_map(device, quantization, is_on_host=is_on_host)
    if is_part:
        # Of a pretrained VLM, only the language model is loaded, under the names that its class has alone.
        options["key_mapping"] = _LLM_KEYS
    if quantization != "none":
        options["quantization_config"] = expert_quantization(folder, quantization_config(quantization, dtype))
    model, missing = _from_pretrained(model_class, folder, options)
    # Names beyond those of the model, such as the vision tower's, are expected and ignored.
    if missing:  # transformers initialises them randomly
        raise UserError(
            f"llm.checkpoint {folder} lacks {len(missing)} weights, first: {missing[0]}; use a complete checkpoint"
        )
    check_attention(model, chosen)
    if quantization == "4bit":
        keep_packing(model)
        check_experts_packed(model)
    return model.requires_grad_(False).eval()


def device_map(device: str, quantization: str, *, is_on_host: bool) -> dict[str, str]:
    """Returns the device that `from_pretrained` reads every weight to, so that host memory holds no second copy."""
    return {"": "cpu" if is_on_host and quantization == "none" else device}


def build_meta_language_model(folder: Path, *, dtype: torch.dtype, attention: str, device: str) -> nn.Module:
    """Builds the unquantised model of `load_language_model` on the meta device, without opening a weight file.

    Args:
        folder: Checkpoint in Hugging Face layout.
        dtype: Dtype of the weights.
        attention: Requested attention, as for `choose_attention`.
        device: Device that the model will run on.

    Raises:
        UserError: The folder holds no causal language model.
    """
    config, model_class, _ = language_config(folder)
    chosen = choose_attention(attention, device, dtype, model_class)
    with torch.device("meta"):
        model: nn.Module = model_class._from_config(config, dtype=dtype, attn_implementation=chosen)
    return model.requires_grad_(False).eval()


def keep_packing(model: nn.Module) -> None:
    """Stops bitsandbytes from repacking 4-bit weights in place at the first inference on a CPU with AVX-512 BF16.

    Code that reads the weights afterwards, such as DoRA, would misread them.

    Raises:
        UserError: A layer's width is not a multiple of the block of 64 weights, which bitsandbytes 0.50 unpacks wrongly
            on such CPUs.
    """
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
            is_misread = module.weight.device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX512"
            if is_misread and module.in_features % BLOCK:
                raise UserError(
                    f"llm.quantization=4bit is not possible on this CPU, as bitsandbytes misreads layers of width "
                    f"{module.in_features}, which is not a multiple of {BLOCK}; set llm.quantization=none"
                )


def context_length(folder: Path) -> int:
    """Returns the maximum number of positions, from the configuration only."""
    return int(_text_config(folder).max_position_embeddings)


def text_width(folder: Path) -> int:
    """Returns Dl, the width of the language model's embeddings, from the configuration only."""
    return int(_text_config(folder).hidden_size)


def num_active_parameters(folder: Path) -> int:
    """Returns the number of parameters that are active for a token, from the configuration only.

    Embeddings and head do not count, and of the experts only those that a token is routed to.
    """
    from transformers import AutoModel

    config = _text_config(folder)
    with torch.device("meta"):
        model: nn.Module = AutoModel.from_config(config)
    # The share of a layer's experts that a token passes through.
    used = getattr(config, "num_experts_per_tok", 1) / (getattr(config, "num_experts", None) or 1)
    embeddings = model.get_input_embeddings().weight  # type: ignore[operator]
    counts = [
        parameter.numel() * (used if ".experts." in name else 1)
        for name, parameter in model.named_parameters()
        # Looking up an embedding costs no multiplication.
        if parameter is not embeddings
    ]
    return round(sum(counts))


def _text_config(folder: Path) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder, trust_remote_code=False).get_text_config()


def language_config(folder: Path) -> tuple[Any, Any, bool]:
    """Returns the language model's configuration, its class, and whether it is part of a pretrained VLM.

    Raises:
        UserError: The folder has no configuration of a causal language model in transformers.
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
    if text is not whole and whole.tie_word_embeddings:  # the head of a pretrained VLM is tied by the whole
        text.tie_word_embeddings = True
    try:
        return text, MODEL_FOR_CAUSAL_LM_MAPPING[type(text)], text is not whole
    except KeyError as error:
        raise UserError(
            f"llm.checkpoint {folder} holds a {text.model_type}, which is not a causal language model; set llm to "
            "another one, or choose a pretrained VLM by model="
        ) from error


def _from_pretrained(model_class: Any, folder: Path, options: dict[str, Any]) -> tuple[nn.Module, list[str]]:
    """Loads the model, and returns it with the names of missing weights."""
    from safetensors import SafetensorError

    try:
        model, loading = model_class.from_pretrained(folder, weights_only=True, output_loading_info=True, **options)
    except (pickle.UnpicklingError, EOFError) as error:  # PyTorch's message would advise running the code after all
        raise UserError(
            f"llm.checkpoint {folder} has a pytorch_model*.bin that is broken or holds more than tensors, so reading "
            "it could run foreign code; use a checkpoint with safetensors"
        ) from error
    except (ValueError, KeyError, OSError, ImportError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"llm.checkpoint {folder} could not be loaded as a causal language model: {first_line(error)}"
        ) from error
    return cast(nn.Module, model), sorted(loading["missing_keys"])
