"""Vision towers of transformers.

Cut behind the chosen layer, filled from a checkpoint that may hold much more, given adapters.
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
from torch import Tensor, nn

from vlmcap.config import LoraConfig
from vlmcap.errors import UserError, first_line
from vlmcap.models.checkpoint import holding, read_safetensors, weight_files
from vlmcap.models.encoders.base import EncoderOptions, Family
from vlmcap.models.encoders.classes import TIMM, UnknownLayoutError, describe_timm, refusal, set_depth, tower_class
from vlmcap.models.encoders.families import family_of
from vlmcap.models.encoders.layout import numberless
from vlmcap.models.llm.adapt import peft_settings

_PARTS = ("vision_config", "image_config")  # where the configurations of whole models have their tower's
_OF_TOWER = re.compile(r"vision|visual|image|backbone")  # what whole models put in front of the names of its tensors
_OF_TEXT = re.compile(r"text|language")


def vision_config(values: Mapping[str, Any], source: str) -> tuple[Family, Any]:
    """The rules for the tower and its configuration alone, in transformers' class.

    Args:
        values: A `config.json`, of the tower or of a whole model.
        source: What it was read from, for the error.

    Raises:
        UserError: transformers has no such type of model.
    """
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    part = next((values[key] for key in _PARTS if values.get(key)), values)
    # timm's own files name no type.
    model_type = part.get("model_type") or (
        TIMM if "pretrained_cfg" in part and "architecture" in part else _type_of_part(values)
    )
    family = family_of(model_type)
    known = {**family.config_values({**part, "model_type": model_type})}
    if known["model_type"] not in CONFIG_MAPPING:
        raise UserError(
            f"{source} holds a model of type '{model_type}', which transformers does not know, and code inside a "
            "checkpoint is never run; "
            "set encoder.checkpoint to one in the layout of transformers"
        )
    try:
        whole = AutoConfig.for_model(**known)
    except Exception as error:  # each class validates in its own way
        raise UserError(f"the config.json of {source} is not valid ({first_line(error)}); copy it again") from error
    inner = next((getattr(whole, key) for key in _PARTS if key in getattr(whole, "sub_configs", ())), None)
    if inner is not None:
        family, whole = family_of(inner.model_type), inner
    if whole.model_type == TIMM:
        try:
            describe_timm(whole)
        except UnknownLayoutError as error:
            raise refusal(source, whole, error) from error
    return family, whole


def _type_of_part(values: Mapping[str, Any]) -> str:
    """Type of a tower that a whole model's configuration leaves unnamed."""
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    whole = values.get("model_type")
    if whole not in CONFIG_MAPPING:
        return str(whole)
    config = AutoConfig.for_model(whole)
    return str(
        next((getattr(config, key).model_type for key in _PARTS if getattr(config, key, None) is not None), whole)
    )


def read_config(folder: Path) -> dict[str, Any]:
    """The `config.json` of a checkpoint.

    Raises:
        UserError: There is none.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise UserError(f"encoder.checkpoint {folder} has no config.json; name a folder in Hugging Face layout")
    values: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return values


def build_tower(family: Family, config: Any, options: EncoderOptions, source: str) -> nn.Module:
    """The tower with random weights, without the blocks behind the chosen layer: its last hidden state is the features.

    Args:
        family: Rules for the tower.
        config: As `vision_config` returned it; its number of layers is set to those kept.
        options: Layer, type of weights and attention.
        source: What the configuration was read from, for the error.

    Raises:
        UserError: There is no such layer, or the class gives no grid of patch features.
    """
    dropped = _cut(family, config, options, source)
    model_class = tower_class(config)
    tower: nn.Module = model_class._from_config(
        config, dtype=options.dtype, attn_implementation=_attention(family, model_class, options.attention)
    )
    return _without(tower, dropped)


def _cut(family: Family, config: Any, options: EncoderOptions, source: str) -> tuple[str, ...]:
    """Sets the number of blocks and names the modules to leave out."""
    try:
        idle, layer, depth = family.layout(config).idle, options.feature_layer, int(config.num_hidden_layers)
        if not -depth - 1 <= layer <= depth:
            raise UserError(f"encoder.feature_layer must be in {-depth - 1}…{depth} for this encoder, not {layer}")
        if layer == -1 and not family.is_raw:
            return idle
        norm = family.final_norm(config)
    except UnknownLayoutError as error:
        raise refusal(source, config, error) from error
    if norm is None:
        raise UserError(
            f"encoder.feature_layer={layer} is not possible for '{config.model_type}', whose class gives no features "
            "of inner layers; "
            "set encoder.feature_layer=-1"
        )
    kept = layer if layer >= 0 else depth + 1 + layer
    if kept == depth and norm.is_counted and not family.is_raw:
        return idle
    set_depth(config, kept)
    return (*idle, norm.name) if norm.name else idle


def _attention(family: Family, model_class: Any, wanted: str) -> str:
    """Implementation that the class has."""
    if "flash" in wanted and not (family.has_flash and model_class._supports_flash_attn):
        wanted = "sdpa"
    return "eager" if wanted == "sdpa" and not model_class._supports_sdpa else wanted


def _without(tower: nn.Module, names: tuple[str, ...]) -> nn.Module:
    for name in names:
        tower.set_submodule(name, nn.Identity())
    return tower


def load_tower(family: Family, config: Any, folder: Path, options: EncoderOptions, device: str = "cpu") -> nn.Module:
    """The tower with its weights out of `folder`; nothing else is read, no memory is spent on anything else.

    Args:
        family: Rules for the tower.
        config: As `vision_config` returned it.
        folder: Checkpoint of the tower or of a whole model.
        options: Layer, type of weights and attention.
        device: Where each weight is put as it is read, so that no second copy stands in host memory.

    Raises:
        UserError: No such layer, or weights are missing, unreadable or of another shape.
    """
    source = f"encoder.checkpoint {folder}"
    dropped = _cut(family, config, options, source)
    model_class = tower_class(config)
    with torch.device("meta"):
        names = _Names(family, model_class._from_config(config), dropped)
    weights = read_weights(folder, names)
    settings: dict[str, Any] = {
        "dtype": options.dtype,
        "attn_implementation": _attention(family, model_class, options.attention),
    }
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        tower, loading = model_class.from_pretrained(
            None,
            config=config,
            state_dict=weights,
            device_map={"": device},
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **settings,
        )
    _check(folder, names.required(family.layout(config).unused), loading)
    return _without(tower, dropped)


class _Names:
    """What the names in a checkpoint mean.

    Args:
        family: Rules for the tower.
        tower: The same on the meta device, whole.
        dropped: Modules that the encoder leaves out.
    """

    def __init__(self, family: Family, tower: Any, dropped: tuple[str, ...]) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter

        self._family, self._prefix, self._class = family, tower.base_model_prefix, type(tower)
        self._state = {
            name: value
            for name, value in tower.state_dict().items()
            if not name.startswith(tuple(f"{d}." for d in dropped))
        }
        conversions = get_model_conversion_mapping(tower)
        self._converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
        self._renamings = [entry for entry in conversions if not isinstance(entry, WeightConverter)]

    def required(self, unused: frozenset[str]) -> set[str]:
        """Tensors that a checkpoint must have.

        All that count, less those that the class fills in by a rule, such as scales of 1.
        """
        optional = [re.compile(pattern) for pattern in self._class._keys_to_ignore_on_load_missing or ()]
        return {
            name
            for name in self._state
            if numberless(name) not in unused and not any(pattern.search(name) for pattern in optional)
        }

    def __call__(self, key: str) -> tuple[str, ...]:
        """Names under which transformers reads a tensor of the tower, what a whole model puts in front cut off.

        Of others, none.
        """
        parts = key.split(".")
        for index in range(len(parts)):
            front = ".".join(parts[:index])
            if index and (not _OF_TOWER.search(front) or _OF_TEXT.search(front)):
                continue
            names = self._family.names(".".join(parts[index:]))
            if all(self._is_known(name) for name in names):
                return names
        return ()

    def _is_known(self, name: str) -> bool:
        from transformers.core_model_loading import rename_source_key

        found, _ = rename_source_key(name, self._renamings, self._converters, self._prefix, self._state)
        return found in self._state or name in self._state


def read_weights(folder: Path, names: Callable[[str], tuple[str, ...]]) -> dict[str, Tensor]:
    """Every tensor that has a name and no other; files that hold none of them are not opened.

    Args:
        folder: Checkpoint in Hugging Face layout, of the tower alone or of a whole model.
        names: What the checkpoint's names mean; several names where one tensor holds several, stacked.

    Raises:
        UserError: Weights are unreadable, or there are two of a name.
    """
    from safetensors import SafetensorError

    weights: dict[str, Tensor] = {}
    try:
        for key, tensor in _read(folder, lambda key: bool(names(key))):
            targets = names(key)
            if twice := sorted(weights.keys() & set(targets)):
                raise UserError(
                    f"encoder.checkpoint {folder} holds two vision towers, as {twice[0]} is there twice; take one "
                    "with a single one"
                )
            parts = tensor.chunk(len(targets))
            # A part of a larger tensor would keep all of it in memory.
            weights |= {
                name: part.clone() if len(targets) > 1 else part for name, part in zip(targets, parts, strict=True)
            }
    except UserError:
        raise
    except (OSError, EOFError, ValueError, RuntimeError, SafetensorError, pickle.UnpicklingError) as error:
        raise UserError(
            f"encoder.checkpoint {folder} could not be read ({first_line(error)}); copy it again"
        ) from error
    return weights


def _check(folder: Path, required: set[str], loading: Mapping[str, Any]) -> None:
    """`UserError` for a gap that transformers filled with random numbers."""
    source = f"encoder.checkpoint {folder}"
    for name, found, expected in sorted(loading["mismatched_keys"]):
        raise UserError(
            f"{source} has {name} of shape {tuple(found)} where its config.json means {tuple(expected)}; "
            "take config.json and weights of one checkpoint"
        )
    if missing := sorted(required & set(loading["missing_keys"])):
        raise UserError(
            f"{source} lacks {len(missing)} weights of the vision tower, first: {missing[0]}; take a whole checkpoint"
        )
    if errors := loading.get("error_msgs"):
        raise UserError(f"{source} could not be read ({str(errors[0]).splitlines()[0]}); copy it again")


def _read(folder: Path, is_wanted: Callable[[str], bool]) -> Iterator[tuple[str, Tensor]]:
    """Wanted tensors with their names in the checkpoint."""
    if weight_files(folder, "model.safetensors"):
        yield from read_safetensors(folder, is_wanted)
        return
    files = weight_files(folder, "pytorch_model.bin")  # what some older revisions on the hub have alone
    if not files:
        raise FileNotFoundError("it has no model.safetensors")
    for file in holding(files, is_wanted):
        # Files from before torch 1.6 are no zip archives, and only those can be mapped.
        pickled: Any = torch.load(file, map_location="cpu", weights_only=True, mmap=is_zipfile(file))
        yield from ((key, tensor) for key, tensor in pickled.items() if is_wanted(key))


def add_tower_lora(tower: nn.Module, lora: LoraConfig) -> None:
    """Puts adapters in float32 on every linear layer of a frozen tower, in place, so that it keeps its class and interface.

    Args:
        tower: Of a `VisionEncoder`.
        lora: Settings of the adapters; which modules they are on, and experts, are the language model's matter.

    Raises:
        UserError: The tower has no linear layer.
    """
    from peft import inject_adapter_in_model

    # Full names: in Qwen's towers a convolution has the last name of a linear layer (proj), and peft would adapt it
    # too.
    targets = [name for name, module in tower.named_modules() if isinstance(module, nn.Linear)]
    if not targets:
        raise UserError("tuning.encoder=lora finds no linear layer in this encoder; set tuning.encoder=full or none")
    inject_adapter_in_model(peft_settings(lora, targets), tower)
    for name, parameter in tower.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if "lora_" in name:
            parameter.data = parameter.data.float()  # mixed precision wants float32 masters
