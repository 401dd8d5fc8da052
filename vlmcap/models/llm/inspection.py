"""Describes a language model checkpoint from its small files, without opening weights.

Class, end tokens, license and supported features are all determined from the folder, so no table of models is needed.
"""

from __future__ import annotations

import importlib.util
import inspect
import re
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vlmcap.config import LlmConfig
from vlmcap.errors import UserError
from vlmcap.models.decoding.engine import supports_native_engine
from vlmcap.models.llm.attention import PACKABLE, supported_attention
from vlmcap.models.llm.load import language_config
from vlmcap.models.llm.prompt import PromptEncoder, generation_config, load_prompt, load_tokenizer

_MAX_LICENSE_CHARS = 120  # of the first line of a LICENSE file
# If these packages are installed, transformers uses their kernels; otherwise it is correct, but slower.
# Matches `use_kernel_func_from_hub_with_fallback("causal_conv1d_fn", "causal_conv1d")`.
_PACKAGE = re.compile(r"use_kernel_func_from_hub_with_fallback\(\s*\"\w+\",\s*\"(\w+)\"")
_HUB_KERNELS = "is_kernels_available()"  # in the source of the few classes that download compiled code themselves
_DISTRIBUTIONS = {"fla": "flash-linear-attention"}  # import names that differ from the names of their distributions


@dataclass(frozen=True, slots=True)
class LlmDescription:
    """Properties of a language model that are known before its weights are loaded.

    Attributes:
        model_class: Name of the transformers class.
        model_type: Type in its configuration.
        is_part: Whether it is the language model of a pretrained VLM.
        context: Maximum number of positions; None if there is no limit.
        hidden_size: Width of its embeddings.
        num_layers: Number of its layers.
        vocab_size: Number of rows of its embedding.
        largest_id: Largest token id of the tokenizer, added tokens included; None without a tokenizer.
        has_chat_template: Whether the tokenizer has a chat template.
        end_tokens: Tokens that end generation, first the one that the template puts after an answer; empty without a
            template.
        has_thinking_switch: Whether the chat template reads `enable_thinking`.
        license: License that the folder states; empty if it states none.
        attention: Attention implementations that the class supports.
        sliding_window: Window of sliding-window layers in tokens; None if every layer attends to all tokens.
        is_packable: Whether `data.batching=packed` keeps the clips of a row apart.
        is_native: Whether `evaluation.engine=native` can decode captions; otherwise transformers' `generate` does.
        optional_packages: Packages that make the class faster.
        missing_packages: Optional packages that are not installed.
        problems: One sentence for each reason why a run cannot use the checkpoint as it is.
    """

    model_class: str
    model_type: str
    is_part: bool
    context: int | None
    hidden_size: int
    num_layers: int
    vocab_size: int
    largest_id: int | None
    has_chat_template: bool
    end_tokens: tuple[str, ...]
    has_thinking_switch: bool
    license: str
    attention: tuple[str, ...]
    sliding_window: int | None
    is_packable: bool
    is_native: bool
    optional_packages: tuple[str, ...]
    missing_packages: tuple[str, ...]
    problems: tuple[str, ...]

    def plain(self) -> dict[str, Any]:
        """Returns the description as plain data for JSON."""
        return asdict(self)


def describe_llm(folder: Path, *, chat_template: str | None = None) -> LlmDescription:
    """Describes a language model, or the language model of a pretrained VLM.

    Args:
        folder: Checkpoint in Hugging Face layout; weights are not needed.
        chat_template: Template that will replace the tokenizer's.

    Raises:
        UserError: The folder holds no causal language model that transformers supports.
    """
    config, model_class, is_part = language_config(folder)
    packages = optional_packages(model_class)
    problems = []
    # The source says it without building the model.
    if "lm_head" not in inspect.getsource(model_class):
        problems.append(
            f"{model_class.__name__} has no output layer named lm_head, which vlmcap needs; choose another llm"
        )
    tokenizer, template, prompt = None, "", None
    try:
        tokenizer = load_tokenizer(folder)
        template = _template_of(tokenizer)
        prompt = load_prompt(folder, LlmConfig(prompt="?", chat_template=chat_template))
    except UserError as error:
        problems.append(str(error))
    return LlmDescription(
        model_class=model_class.__name__,
        model_type=config.model_type,
        is_part=is_part,
        context=getattr(config, "max_position_embeddings", None),
        hidden_size=int(config.hidden_size),
        num_layers=int(config.num_hidden_layers),
        vocab_size=int(config.vocab_size),
        # Added tokens are in the vocabulary too.
        largest_id=None if tokenizer is None else max(tokenizer.get_vocab().values()),
        has_chat_template=bool(template),
        end_tokens=() if prompt is None else _end_tokens(prompt),
        has_thinking_switch="enable_thinking" in (chat_template or template),
        license=license_of(folder),
        attention=supported_attention(model_class),
        sliding_window=_sliding_window(config),
        is_packable=config.model_type in PACKABLE,
        is_native=supports_native_engine(config, generation_config(folder)),
        optional_packages=tuple(_DISTRIBUTIONS.get(package, package.replace("_", "-")) for package in packages),
        missing_packages=tuple(
            _DISTRIBUTIONS.get(one, one.replace("_", "-")) for one in packages if importlib.util.find_spec(one) is None
        ),
        problems=tuple(problems),
    )


def license_of(folder: Path) -> str:
    """Returns the license in the front matter of a README.md, or else the title of a LICENSE file; empty without both.

    If the license is "other" or "unknown", `license_name` is returned if it is stated.

    Args:
        folder: Checkpoint in Hugging Face layout.
    """
    from huggingface_hub.repocard import metadata_load

    stated: dict[str, Any] = {}
    if (folder / "README.md").is_file():
        try:
            stated = metadata_load(folder / "README.md") or {}
        except Exception:  # an invalid README states no license
            stated = {}
    named = stated.get("license")
    # For "other", the hub's cards name the license in a second key.
    if named in (None, "other", "unknown"):
        named = stated.get("license_name") or named
    if named:
        return ", ".join(map(str, named)) if isinstance(named, list) else str(named)
    files = sorted(file for file in folder.glob("LICENSE*") if file.is_file())
    lines = (
        # "# Apache License" -> "Apache License"
        line.strip(" #*\t")
        for file in files[:1]
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines()
    )
    return next((line[:_MAX_LICENSE_CHARS] for line in lines if line), "")


def optional_packages(model_class: Any) -> tuple[str, ...]:
    """Returns the import names of packages that the module of a transformers class uses if they are installed."""
    source = inspect.getsource(sys.modules[model_class.__module__])
    hub = ("kernels",) if _HUB_KERNELS in source else ()
    return (*dict.fromkeys(_PACKAGE.findall(source)), *hub)


def _template_of(tokenizer: Any) -> str:
    """Returns the tokenizer's default chat template; empty if it has none."""
    try:
        return str(tokenizer.get_chat_template())
    except ValueError:
        return ""


def _end_tokens(prompt: PromptEncoder) -> tuple[str, ...]:
    return tuple(prompt.tokenizer.convert_ids_to_tokens(prompt.stop_ids))


def _sliding_window(config: Any) -> int | None:
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    # Qwen states a window, and by `use_sliding_window` that it is not used.
    is_used = getattr(config, "use_sliding_window", True) and (kinds is None or "sliding_attention" in kinds)
    return int(window) if window and is_used else None
