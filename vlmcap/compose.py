"""Composes YAML files and overrides into a checked `Config`, and reports every mistake in one sentence."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from enum import Enum
from functools import cache
from math import prod
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vlmcap import config as schema
from vlmcap.config import Config
from vlmcap.config.kinds import SCHEMAS, check_kind, schema_of
from vlmcap.config.run import MODEL_KEYS, check_native_components
from vlmcap.config_errors import explain, innermost
from vlmcap.config_files import config_dir, config_file
from vlmcap.config_joined import join_encoders
from vlmcap.config_unread import unread_override
from vlmcap.errors import UserError
from vlmcap.files import write_text
from vlmcap.overrides import read_overrides
from vlmcap.plugins import load_plugins, plugin_kinds

CUSTOM = "custom"  # file of a group for any other checkpoint
_NAMED = ("model", "encoder", "projector", "llm", "tuning", "hardware", "data")  # groups with a name
_PLAIN_GROUPS = {  # groups with a single kind
    "hardware": schema.HardwareConfig,
    "evaluation": schema.EvaluationConfig,
    "optim": schema.OptimConfig,
    "trainer": schema.TrainerConfig,
    "callbacks": schema.CallbacksConfig,
    "paths": schema.PathsConfig,
}


def register_schemas() -> None:
    """Registers the dataclasses with Hydra as `config_schema` and `<group>/<kind>_schema`.

    The defaults list of each YAML file starts with one of them. A plugin's kind is also registered under its own name,
    so that it needs no YAML file; an existing file of that name takes precedence.
    """
    from hydra.core.config_store import ConfigStore

    load_plugins()
    # conf/debug/fast.yaml multiplies values.
    OmegaConf.register_new_resolver("product", lambda *factors: prod(factors), replace=True)
    store = ConfigStore.instance()
    store.store(name="config_schema", node=_following(Config))
    for group, node in _PLAIN_GROUPS.items():
        store.store(group=group, name=f"{group}_schema", node=_following(node))
    for group, kinds in SCHEMAS.items():
        for kind, node in kinds.items():
            store.store(group=group, name=f"{kind}_schema", node=_following(node))
        # A plugin's kind can be chosen by its name, also without a YAML file.
        for kind in plugin_kinds(group):
            if config_file(f"{group}/{kind}").is_file():
                continue
            named = _following(kinds[kind])
            named.name = kind
            store.store(group=group, name=kind, node=named)


def _following(schema_class: type) -> DictConfig:
    """Returns a dataclass as a node with its defaults, or with references for fields that follow other keys."""
    node = OmegaConf.structured(schema_class)
    for field in fields(schema_class):
        if source := field.metadata.get("follows"):
            OmegaConf.update(node, field.name, source)
        elif is_dataclass(default := cast(Any, field.default_factory)):
            node[field.name] = _following(cast(type, default))
    return cast(DictConfig, node)


def _typed(plain: Mapping[str, Any]) -> DictConfig:
    """Returns the schema of a configuration, with the dataclass of the chosen kind in each group.

    Raises:
        UserError: A group has no such kind.
    """
    load_plugins()
    try:
        kinds = {group: schema_of(group, str((plain.get(group) or {}).get("kind"))) for group in SCHEMAS}
    except ValueError as error:
        raise UserError(str(error)) from error
    return _structured(tuple(kinds.items())).copy()


@cache
def _structured(kinds: tuple[tuple[str, type], ...]) -> DictConfig:
    """Returns the schema with these dataclasses in its groups; cached, as building it is slow."""
    node = OmegaConf.structured(Config)
    for group, schema_class in kinds:
        is_native = getattr(schema_class, "kind", None) == "native"
        node[group] = _following(schema_class) if is_native else OmegaConf.structured(schema_class)
    return cast(DictConfig, node)


def compose(overrides: Sequence[str], *, name: str = "train") -> Config:
    """Returns the configuration that `train.py` would run with these overrides.

    Args:
        overrides: Overrides as typed on the command line.
        name: Name of the top-level YAML file under `conf/`.

    Raises:
        UserError: An override has an unknown key or a wrong value.
    """
    return checked_config(compose_node(overrides, name=name), overrides)


def compose_node(overrides: Sequence[str], *, name: str = "train") -> DictConfig:
    """Returns the configuration of `compose` before interpolations are resolved and checks are run.

    Raises:
        UserError: An override has an unknown key or a wrong value.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException

    register_schemas()
    try:
        with initialize_config_dir(config_dir(), version_base="1.3"):
            node = hydra_compose(name, overrides=read_overrides(overrides), return_hydra_config=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(explain(innermost(error))) from error
    # A node in struct mode refuses new and removed keys.
    OmegaConf.set_struct(node, False)
    hydra_node = node.pop("hydra")
    name_components(node, hydra_node)
    # It refers to Hydra's folder of the run, and that node has just been taken off.
    if OmegaConf.is_interpolation(node.paths, "output_dir"):
        is_missing = OmegaConf.is_missing(hydra_node.run, "dir")
        node.paths.output_dir = "outputs" if is_missing else str(hydra_node.run.dir)
    return node


# Keys of a group's file that belong to its checkpoint, with their values for any other checkpoint.
_CHECKPOINT_DEFAULTS: dict[str, Any] = {
    "revision": None,
    "gate": None,
    "license": schema.UNKNOWN,
    "chat_template": None,
    "max_caption_tokens": schema.AUTO,
    "max_new_tokens": schema.AUTO,
    "prompt": schema.AUTO,
}


def name_components(node: DictConfig, hydra_node: Any) -> None:
    """Names components after their checkpoints if these differ from the checkpoints of their YAML files.

    Otherwise, `llm=vicuna_7b llm.checkpoint=…` would give name, license and chat template of Vicuna to another model.
    Values from the command line are kept.

    Args:
        node: Composed configuration before interpolations are resolved, changed in place.
        hydra_node: Hydra's own configuration, with choices and overrides.
    """
    # 1. Names of the user's own files.
    choices = hydra_node.runtime.choices
    join_encoders(node, hydra_node.overrides.task, _following)
    typed = {override.lstrip("+").partition("=")[0] for override in hydra_node.overrides.task}
    for group in _NAMED:
        if f"{group}.name" not in typed:
            _name_by_file(node, group, choices.get(group))
    # 2. Names, licenses and prompts of checkpoints that differ from those of their files.
    for group in ("model", "encoder", "llm"):
        file = config_file(f"{group}/{choices.get(group)}")
        values = cast(dict[str, Any], OmegaConf.to_container(node[group], resolve=False))
        if (
            not file.is_file()
            or values.get("checkpoint", "???") == "???"  # OmegaConf's "???" is a missing value
            or OmegaConf.is_interpolation(node[group], "checkpoint")
        ):
            continue
        content = read_yaml(file)
        in_file = content if group != "model" else content["model"]  # that of a pretrained VLM also sets other groups
        is_typed = f"{group}.checkpoint" in typed
        is_another = values["checkpoint"] != in_file["checkpoint"] if "checkpoint" in in_file else is_typed
        if not is_another:
            continue
        _replace(node, group, {"name": checkpoint_name(values["checkpoint"])} | _CHECKPOINT_DEFAULTS, in_file, typed)
        if group == "model":
            _replace(node, "llm", _CHECKPOINT_DEFAULTS, content.get("llm", {}), typed)


def _name_by_file(node: DictConfig, group: str, choice: str | None) -> None:
    """Names a group after the user's own YAML file if that states no name, instead of the file that it extends."""
    file = config_file(f"{group}/{choice}")
    content: dict[str, Any] = read_yaml(file) if file.is_file() else {"name": choice}
    if "name" in content or "name" in content.get(group, {}):
        return
    is_inherited = OmegaConf.is_missing(node[group], "name") or config_file(f"{group}/{node[group].name}").is_file()
    if is_inherited:
        node[group].name = file.stem


def _replace(
    node: DictConfig, group: str, values: Mapping[str, Any], in_file: Mapping[str, Any], typed: set[str]
) -> None:
    """Replaces values that come from a group's file or from defaults; values from the command line are kept."""
    for key, value in values.items():
        is_there = key in node[group] and not OmegaConf.is_interpolation(node[group], key)
        if is_there and f"{group}.{key}" not in typed and node[group][key] == in_file.get(key, node[group][key]):
            node[group][key] = value


def checkpoint_name(checkpoint: str) -> str:
    """Returns the last component of a hub id or a folder in lower case; a folder of the hub's cache has its hub id."""
    path = Path(os.path.abspath(os.path.expanduser(checkpoint)))
    # The hub's cache has …/models--ORG--NAME/snapshots/COMMIT.
    is_cached = path.parent.name == "snapshots"
    return (path.parents[1].name.rpartition("--")[2] if is_cached else path.name).lower()


class Composed:
    """A composed configuration whose groups can be replaced by those of another one.

    Composing takes a third of a second, so a table of many combinations composes each name once and combines groups.

    Args:
        overrides: Overrides as typed on the command line.

    Raises:
        UserError: An override has an unknown key or a wrong value.
    """

    def __init__(self, overrides: Sequence[str]) -> None:
        self._node = compose_node(overrides)

    def config(self) -> Config:
        """Returns the checked configuration."""
        return to_config(self._node)

    def groups_with(self, group: str, other: Composed, names: Sequence[str]) -> dict[str, Any]:
        """Returns groups of the configuration after one group is taken from another configuration.

        Args:
            group: Group that is replaced before interpolations are resolved.
            other: Configuration with the replacement.
            names: Names of the groups to return, which depend on `group`.
        """
        node = self._node.copy()
        node[group] = other._node._get_node(group)
        return {name: OmegaConf.to_object(node[name]) for name in names}


def to_config(node: DictConfig) -> Config:
    """Resolves interpolations, runs every check, and returns the typed configuration.

    Raises:
        UserError: A value is missing, has the wrong type, or contradicts another one.
    """
    try:
        # 1. Refuse kinds and components that do not belong together, before their keys would be called unknown.
        plain = cast(dict[str, Any], OmegaConf.to_container(node, resolve=False))
        for group in SCHEMAS:
            composed = OmegaConf.get_type(node[group])
            if is_dataclass(composed) and hasattr(composed, "kind"):
                check_kind(group, plain[group], composed.kind)
        check_native_components(plain)
        # 2. Hydra allows `+group.key=value` to add any key; merging plain values into the schema refuses unknown ones.
        config = OmegaConf.to_object(OmegaConf.merge(_typed(plain), plain))
    except OmegaConfBaseException as error:
        raise UserError(explain(error)) from error
    except ValueError as error:
        raise UserError(str(error)) from error
    assert isinstance(config, Config)
    return config


def checked_config(node: DictConfig, overrides: Sequence[str]) -> Config:
    """Returns the typed configuration of a command line, on which every key must have an effect.

    Args:
        node: Composed configuration before interpolations are resolved.
        overrides: Overrides as typed on the command line.

    Raises:
        UserError: See `to_config`; or nothing reads a key of the command line.
    """
    config = to_config(node)
    if sentence := unread_override(node, config, overrides):
        raise UserError(sentence)
    return config


def to_plain(config: object) -> Any:
    """Converts a configuration to dictionaries, lists, text and numbers for files and checkpoints."""
    if isinstance(config, Enum):
        return config.name
    if isinstance(config, dict):
        return {name: to_plain(value) for name, value in config.items()}
    if is_dataclass(config) and not isinstance(config, type):
        return {name: to_plain(value) for name, value in asdict(config).items()}
    return config


def write_yaml(plain: Any, path: Path) -> None:
    """Writes plain data to a YAML file atomically."""
    write_text(path, OmegaConf.to_yaml(OmegaConf.create(plain)))


def read_yaml(path: Path) -> Any:
    """Reads the plain data of a YAML file; references to other keys stay text.

    Raises:
        Exception: The file does not exist or is not valid YAML.
    """
    return OmegaConf.to_container(OmegaConf.load(path), resolve=False)


def from_plain(plain: dict[str, Any], overrides: Mapping[str, Any] | None = None) -> DictConfig:
    """Returns a node with the types of the schema, saved values, and `overrides` by dotted key.

    Raises:
        UserError: The values do not fit the schema.
    """
    try:
        followed = {  # native components follow the keys of their model, which an override may replace
            group: {key: value for key, value in values.items() if key not in MODEL_KEYS}
            if values.get("kind") == "native"
            else values
            for group, values in plain.items()
            if isinstance(values, dict)
        }
        node = cast(DictConfig, OmegaConf.merge(_typed(plain), plain | followed))
    except OmegaConfBaseException as error:
        raise UserError(f"the saved configuration does not fit this version: {explain(error)}") from error
    try:
        # merge=False: a group replaces the saved one, whose kind may have other keys.
        for key, value in (overrides or {}).items():
            OmegaConf.update(node, key, value, merge=False)
    except OmegaConfBaseException as error:
        raise UserError(explain(error)) from error
    return node
