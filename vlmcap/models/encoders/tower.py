"""Vision towers of transformers: truncated after the chosen layer, loaded from larger checkpoints, and adapted."""

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
from vlmcap.models.encoders.classes import (
    TIMM,
    UnknownLayoutError,
    describe_timm,
    refusal,
    set_depth,
    square_side,
    tower_class,
)
from vlmcap.models.encoders.families import REMOTE_CLASSES, family_of
from vlmcap.models.encoders.layout import without_numbers
from vlmcap.models.llm.adapt import peft_settings

_SECTIONS = ("vision_config", "image_config")  # sections of the tower in the configurations of larger models
_TOWER_PREFIX = re.compile(r"vision|visual|image|backbone")  # in the prefix of its tensor names in larger models
_TEXT_PREFIX = re.compile(r"text|language")


def vision_config(values: Mapping[str, Any], source: str) -> tuple[Family, Any]:
    """Returns the rules for a tower and its transformers configuration.

    Args:
        values: Content of a `config.json`, of the tower or of a larger model.
        source: Name of its origin, for the error message.

    Raises:
        UserError: transformers has no such type of model.
    """
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    # 1. The part of the configuration that describes the tower.
    section = next((values[key] for key in _SECTIONS if values.get(key)), values)
    # Files that timm writes state no type.
    is_timm = "pretrained_cfg" in section and "architecture" in section
    model_type = section.get("model_type") or (TIMM if is_timm else _default_tower_type(values))
    if section is not values and model_type == values.get("model_type"):  # as in the files of Idefics3
        model_type = _default_tower_type(values)
    model_type = REMOTE_CLASSES.get(next(iter(section.get("architectures") or ()), ""), model_type)
    # 2. The rules for its type, and the class of its configuration.
    family = family_of(model_type)
    known = {**family.config_values({**section, "model_type": model_type})}
    if known["model_type"] not in CONFIG_MAPPING:
        raise UserError(
            f"{source} holds a model of type '{model_type}', which transformers does not support, and code inside a "
            "checkpoint is never run; set encoder.checkpoint to one in the layout of transformers"
        )
    try:
        whole = AutoConfig.for_model(**known)
    except Exception as error:  # each class validates differently
        raise UserError(f"the config.json of {source} is not valid ({first_line(error)}); copy it again") from error
    # 3. Some types, such as CLIP, name a model of both towers; only the vision part is wanted.
    inner = next((getattr(whole, key) for key in _SECTIONS if key in getattr(whole, "sub_configs", ())), None)
    if inner is not None:
        family, whole = family_of(inner.model_type), inner
    if whole.model_type == TIMM:
        try:
            describe_timm(whole)
        except UnknownLayoutError as error:
            raise refusal(source, whole, error) from error
    return family, whole


def _default_tower_type(values: Mapping[str, Any]) -> str:
    """Returns the default type of the tower in a larger model whose configuration does not state it."""
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    whole = values.get("model_type")
    if whole not in CONFIG_MAPPING:
        return str(whole)
    config = AutoConfig.for_model(whole)
    sections = (getattr(config, key, None) for key in _SECTIONS)
    return str(next((section.model_type for section in sections if section is not None), whole))


def read_config(folder: Path) -> dict[str, Any]:
    """Reads the `config.json` of a checkpoint.

    Raises:
        UserError: There is no such file.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise UserError(f"encoder.checkpoint {folder} has no config.json; set it to a folder in Hugging Face layout")
    values: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return values


def build_tower(family: Family, config: Any, options: EncoderOptions, source: str) -> nn.Module:
    """Builds the tower with random weights and without blocks after the chosen layer.

    Args:
        family: Rules for the tower.
        config: Configuration from `vision_config`; its number of layers is set to those that are kept.
        options: Layer, dtype and attention.
        source: Origin of the configuration, for the error message.

    Returns:
        The tower, whose last hidden state is the features.

    Raises:
        UserError: There is no such layer, or the class returns no grid of patch features.
    """
    dropped = _adapt_config(family, config, options, source)
    model_class = tower_class(config)
    tower: nn.Module = model_class._from_config(
        config, dtype=options.dtype, attn_implementation=_attention(family, model_class, options.attention)
    )
    return _remove_modules(tower, dropped)


def _adapt_config(family: Family, config: Any, options: EncoderOptions, source: str) -> tuple[str, ...]:
    """Sets the number of blocks and the frame size in the configuration; returns the names of modules to remove."""
    if options.image_size is not None and hasattr(config, "crop_size"):
        # V-JEPA 2 counts its rotary positions by it. A size of less than one patch is refused later.
        config.crop_size = max(options.image_size, square_side(config.patch_size))
    try:
        idle, layer, depth = family.layout(config).idle, options.feature_layer, int(config.num_hidden_layers)
        if not -depth - 1 <= layer <= depth:
            raise UserError(f"encoder.feature_layer must be in {-depth - 1}…{depth} for this encoder, not {layer}")
        # The class's own output, with the final norm where it has one.
        if layer == -1 and (options.is_normed or not family.is_raw):
            return idle
        norm = family.final_norm(config)
    except UnknownLayoutError as error:
        raise refusal(source, config, error) from error
    if norm is None:
        raise UserError(
            f"encoder.feature_layer={layer} is not possible for '{config.model_type}', whose class returns no features "
            "of inner layers; set encoder.feature_layer=-1"
        )
    # -1 is the output of the last block: depth + 1 hidden states, the first of them before all blocks.
    kept = layer if layer >= 0 else depth + 1 + layer
    # The last hidden state of this class is after the norm, so the norm stays.
    if kept == depth and norm.is_counted and not family.is_raw:
        return idle
    set_depth(config, kept)
    return (*idle, norm.name) if norm.name else idle


def _attention(family: Family, model_class: Any, wanted: str) -> str:
    """Returns the requested attention implementation, or the best one that the class supports."""
    if "flash" in wanted and not (family.has_flash and model_class._supports_flash_attn):
        wanted = "sdpa"
    return "eager" if wanted == "sdpa" and not model_class._supports_sdpa else wanted


def _remove_modules(tower: nn.Module, names: tuple[str, ...]) -> nn.Module:
    for name in names:
        tower.set_submodule(name, nn.Identity())
    return tower


def load_tower(family: Family, config: Any, folder: Path, options: EncoderOptions, device: str = "cpu") -> nn.Module:
    """Loads the tower in `folder`; no other weights of the checkpoint are read or take memory.

    Args:
        family: Rules for the tower.
        config: Configuration from `vision_config`.
        folder: Checkpoint of the tower or of a larger model.
        options: Layer, dtype and attention.
        device: Device that each weight is read to, so that host memory holds no second copy.

    Raises:
        UserError: There is no such layer, or weights are missing, unreadable or of another shape.
    """
    source = f"encoder.checkpoint {folder}"
    # 1. The names of the tensors that the truncated tower needs.
    dropped = _adapt_config(family, config, options, source)
    model_class = tower_class(config)
    with torch.device("meta"):
        names = _TensorNames(family, model_class._from_config(config), dropped)
    # 2. These tensors, out of the files that hold them.
    weights = read_weights(folder, names)
    # 3. The tower, to which transformers applies its own conversions.
    settings: dict[str, Any] = {
        "dtype": options.dtype,
        "attn_implementation": _attention(family, model_class, options.attention),
    }
    # Building draws random weights before they are replaced; the random state stays as it was.
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
    _check_loading(folder, names.required(family.layout(config).unused), loading)
    return _remove_modules(tower, dropped)


class _TensorNames:
    """Maps the tensor names in a checkpoint to those of a tower.

    Args:
        family: Rules for the tower.
        tower: Tower on the meta device, before modules are removed.
        dropped: Modules that will be removed.
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
        """Returns the names of tensors that a checkpoint must have.

        Tensors are optional if they are `unused` or if the class initialises them by a rule, such as scales of 1.
        """
        optional = [re.compile(pattern) for pattern in self._class._keys_to_ignore_on_load_missing or ()]
        return {
            name
            for name in self._state
            if without_numbers(name) not in unused and not any(pattern.search(name) for pattern in optional)
        }

    def __call__(self, key: str) -> tuple[str, ...]:
        """Returns the names under which transformers loads a tensor of the tower, without the prefix of a larger model.

        Other tensors of the checkpoint have none.
        """
        # "vision_tower.vision_model.encoder.…": cut off one word after another, until the tower knows the rest.
        parts = key.split(".")
        for index in range(len(parts)):
            prefix = ".".join(parts[:index])
            # A prefix with "text" or "language" belongs to a text tower that has layers of the same names.
            if index and (not _TOWER_PREFIX.search(prefix) or _TEXT_PREFIX.search(prefix)):
                continue
            names = self._family.names(".".join(parts[index:]))
            if all(self._is_known(name) for name in names):
                return names
        return ()

    def _is_known(self, name: str) -> bool:
        from transformers.core_model_loading import rename_source_key

        renamed, _ = rename_source_key(name, self._renamings, self._converters, self._prefix, self._state)
        return renamed in self._state or name in self._state


def read_weights(folder: Path, names: Callable[[str], tuple[str, ...]]) -> dict[str, Tensor]:
    """Reads the tensors that `names` maps to at least one name; files without any of them are not opened.

    Args:
        folder: Checkpoint in Hugging Face layout, of the tower or of a larger model.
        names: Maps a name in the checkpoint to names in the tower; several if one tensor holds several, stacked.

    Raises:
        UserError: Weights are unreadable, or two tensors map to one name.
    """
    from safetensors import SafetensorError

    weights: dict[str, Tensor] = {}
    try:
        for key, tensor in _read_tensors(folder, lambda key: bool(names(key))):
            targets = names(key)
            if twice := sorted(weights.keys() & set(targets)):
                raise UserError(
                    f"encoder.checkpoint {folder} holds two vision towers, as {twice[0]} is there twice; use a "
                    "checkpoint with one vision tower"
                )
            if len(targets) == 1:
                weights[targets[0]] = tensor
            else:  # cloned, as a view would keep the whole tensor in memory
                chunks = tensor.chunk(len(targets))
                weights |= {name: chunk.clone() for name, chunk in zip(targets, chunks, strict=True)}
    except UserError:
        raise
    except (OSError, EOFError, ValueError, RuntimeError, SafetensorError, pickle.UnpicklingError) as error:
        raise UserError(
            f"encoder.checkpoint {folder} could not be read ({first_line(error)}); copy it again"
        ) from error
    return weights


def _check_loading(folder: Path, required: set[str], loading: Mapping[str, Any]) -> None:
    """Raises a `UserError` for weights that transformers initialised randomly."""
    source = f"encoder.checkpoint {folder}"
    for name, shape, expected in sorted(loading["mismatched_keys"]):
        raise UserError(
            f"{source} has {name} of shape {tuple(shape)}, but its config.json needs {tuple(expected)}; use "
            "config.json and weights of the same checkpoint"
        )
    if missing := sorted(required & set(loading["missing_keys"])):
        raise UserError(
            f"{source} lacks {len(missing)} weights of the vision tower, first: {missing[0]}; use a complete checkpoint"
        )
    if errors := loading.get("error_msgs"):
        raise UserError(f"{source} could not be read ({str(errors[0]).splitlines()[0]}); copy it again")


def _read_tensors(folder: Path, is_wanted: Callable[[str], bool]) -> Iterator[tuple[str, Tensor]]:
    """Yields wanted tensors with their names in the checkpoint."""
    if weight_files(folder, "model.safetensors"):
        yield from read_safetensors(folder, is_wanted)
        return
    files = weight_files(folder, "pytorch_model.bin")  # the only format of some older revisions on the hub
    if not files:
        raise FileNotFoundError("it has no model.safetensors")
    for file in holding(files, is_wanted):
        # Only zip archives can be memory-mapped, and files from before torch 1.6 are none.
        pickled: Any = torch.load(file, map_location="cpu", weights_only=True, mmap=is_zipfile(file))
        yield from ((key, tensor) for key, tensor in pickled.items() if is_wanted(key))


def add_tower_lora(tower: nn.Module, lora: LoraConfig) -> None:
    """Adds adapters in float32 to every linear layer of a frozen tower, in place; it keeps its class and interface.

    Args:
        tower: Tower of a `VisionEncoder`.
        lora: Settings of the adapters; `target_modules` and `use_experts` apply to the language model only.

    Raises:
        UserError: The tower has no linear layer.
    """
    from peft import inject_adapter_in_model

    # Full names, because in Qwen's towers a convolution has the same leaf name as a linear layer (proj), and peft would
    # adapt it too.
    targets = [name for name, module in tower.named_modules() if isinstance(module, nn.Linear)]
    if not targets:
        raise UserError(
            "tuning.encoder=lora needs linear layers, which this encoder lacks; set tuning.encoder=full or none"
        )
    inject_adapter_in_model(peft_settings(lora, targets), tower)
    for name, parameter in tower.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if "lora_" in name:
            parameter.data = parameter.data.float()  # mixed precision needs float32 master weights
