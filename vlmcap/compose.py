"""From YAML and overrides to a checked `Config`, and every mistake on the way in one sentence."""

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
from vlmcap.config_unread import unread_override
from vlmcap.errors import UserError
from vlmcap.files import replacing
from vlmcap.overrides import read_overrides
from vlmcap.plugins import load_plugins, plugin_kinds

CUSTOM = "custom"  # the file of a group that any checkpoint goes with
_NAMED = ("model", "encoder", "projector", "llm", "tuning", "hardware", "data")  # groups whose files state a name
_PLAIN_GROUPS = {  # those of one kind
    "hardware": schema.HardwareConfig,
    "evaluation": schema.EvaluationConfig,
    "optim": schema.OptimConfig,
    "trainer": schema.TrainerConfig,
    "callbacks": schema.CallbacksConfig,
    "paths": schema.PathsConfig,
}


def register_schemas() -> None:
    """Makes the dataclasses known as `config_schema` and `<group>/<kind>_schema`, the first default of each YAML file.

    A kind of a plugin is known by its own name, too, so that it needs no file; one of that name is found before it.
    """
    from hydra.core.config_store import ConfigStore

    load_plugins()
    OmegaConf.register_new_resolver(
        "product", lambda *factors: prod(factors), replace=True
    )  # as conf/debug/fast.yaml multiplies
    store = ConfigStore.instance()
    store.store(name="config_schema", node=_following(Config))
    for group, node in _PLAIN_GROUPS.items():
        store.store(group=group, name=f"{group}_schema", node=_following(node))
    for group, kinds in SCHEMAS.items():
        for kind, node in kinds.items():
            store.store(group=group, name=f"{kind}_schema", node=_following(node))
        for kind in plugin_kinds(group):
            if config_file(f"{group}/{kind}").is_file():
                continue
            named = _following(kinds[kind])
            named.name = kind
            store.store(group=group, name=kind, node=named)


def _following(schema_class: type) -> DictConfig:
    """A dataclass with its defaults, and with references to other keys where fields follow those."""
    node = OmegaConf.structured(schema_class)
    for known in fields(schema_class):
        if source := known.metadata.get("follows"):
            OmegaConf.update(node, known.name, source)
        elif is_dataclass(default := cast(Any, known.default_factory)):
            node[known.name] = _following(cast(type, default))
    return cast(DictConfig, node)


def _typed(plain: Mapping[str, Any]) -> DictConfig:
    """The schema of a configuration, each group's that of its kind.

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
    """The schema with these dataclasses in its groups; making it takes longer than all else of a configuration."""
    node = OmegaConf.structured(Config)
    for group, schema_class in kinds:
        is_own = getattr(schema_class, "kind", None) == "native"
        node[group] = _following(schema_class) if is_own else OmegaConf.structured(schema_class)
    return cast(DictConfig, node)


def compose(overrides: Sequence[str], *, name: str = "train") -> Config:
    """The configuration that `train.py` would run with these overrides, for tools and tests.

    Raises:
        UserError: An override names what is not there, or has a wrong value.
    """
    return checked_config(compose_node(overrides, name=name), overrides)


def compose_node(overrides: Sequence[str], *, name: str = "train") -> DictConfig:
    """The same before its interpolations are resolved and its checks run.

    Raises:
        UserError: An override names what is not there, or has a wrong value.
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
    OmegaConf.set_struct(node, False)
    hydra_node = node.pop("hydra")
    name_components(node, hydra_node)
    if OmegaConf.is_interpolation(node.paths, "output_dir"):
        node.paths.output_dir = (
            str(hydra_node.run.dir) if not OmegaConf.is_missing(hydra_node.run, "dir") else "outputs"
        )
    return node


# What a group's file says of its own checkpoint, and what is known of another one before it is found.
_OF_CHECKPOINT: dict[str, Any] = {
    "revision": None,
    "gate": None,
    "license": schema.UNKNOWN,
    "chat_template": None,
    "max_caption_tokens": schema.AUTO,
    "max_new_tokens": schema.AUTO,
    "prompt": schema.AUTO,
}


def name_components(node: DictConfig, hydra_node: Any) -> None:
    """Names parts by their checkpoints, where those are not the ones of the files that the parts come from.

    With `llm=vicuna_7b llm.checkpoint=…`, name, license and chat template of Vicuna would be borrowed by another model.
    What the command line sets stays.

    Args:
        node: Composed configuration before its interpolations are resolved, changed in place.
        hydra_node: Hydra's own part of it, with the choices and the overrides.
    """
    choices = hydra_node.runtime.choices
    typed = {override.lstrip("+").partition("=")[0] for override in hydra_node.overrides.task}
    for group in _NAMED:
        if f"{group}.name" not in typed:
            _name_by_file(node, group, choices.get(group))
    for part in ("model", "encoder", "llm"):
        file = config_file(f"{part}/{choices.get(part)}")
        values = cast(dict[str, Any], OmegaConf.to_container(node[part], resolve=False))
        if (
            not file.is_file()
            or values.get("checkpoint", "???") == "???"
            or OmegaConf.is_interpolation(node[part], "checkpoint")
        ):
            continue
        content = read_yaml(file)
        own = (
            content if part != "model" else content["model"]
        )  # the file of a pretrained VLM sets keys of other groups as well
        is_another = values["checkpoint"] != own["checkpoint"] if "checkpoint" in own else f"{part}.checkpoint" in typed
        if not is_another:
            continue
        _replace(node, part, {"name": checkpoint_name(values["checkpoint"])} | _OF_CHECKPOINT, own, typed)
        if part == "model":
            _replace(node, "llm", _OF_CHECKPOINT, content.get("llm", {}), typed)


def _name_by_file(node: DictConfig, group: str, choice: str | None) -> None:
    """Calls a part as the user's own file is called where that states no name.

    It would have that of the file that it begins with.
    """
    file = config_file(f"{group}/{choice}")
    content: dict[str, Any] = read_yaml(file) if file.is_file() else {"name": choice}
    if "name" in content or "name" in content.get(group, {}):
        return
    is_inherited = OmegaConf.is_missing(node[group], "name") or config_file(f"{group}/{node[group].name}").is_file()
    if is_inherited:
        node[group].name = file.stem


def _replace(node: DictConfig, part: str, values: Mapping[str, Any], own: Mapping[str, Any], typed: set[str]) -> None:
    """Puts values in place of those that a group's file has or leaves at their default; what was typed stays."""
    for key, value in values.items():
        is_there = key in node[part] and not OmegaConf.is_interpolation(node[part], key)
        if is_there and f"{part}.{key}" not in typed and node[part][key] == own.get(key, node[part][key]):
            node[part][key] = value


def checkpoint_name(checkpoint: str) -> str:
    """The name of a hub id or a folder: its last component in lower case.

    For a folder of the hub's cache, that of its id.
    """
    path = Path(os.path.abspath(os.path.expanduser(checkpoint)))
    is_cached = path.parent.name == "snapshots"
    return (path.parents[1].name.rpartition("--")[2] if is_cached else path.name).lower()


class Composed:
    """A composed configuration whose groups may still be replaced by those of another one.

    Composing takes a third of a second, so a table of many combinations composes each name once and combines the
    groups.

    Args:
        overrides: Overrides as `compose` takes them.

    Raises:
        UserError: An override names what is not there, or has a wrong value.
    """

    def __init__(self, overrides: Sequence[str]) -> None:
        self._node = compose_node(overrides)

    def config(self) -> Config:
        """The checked configuration."""
        return to_config(self._node)

    def parts_with(self, group: str, other: Composed, parts: Sequence[str]) -> dict[str, Any]:
        """Some parts of the configuration as they are when one group comes from another configuration.

        Args:
            group: Group that is replaced before interpolations are resolved.
            other: Configuration that it is taken from.
            parts: Names of the parts to return, those that depend on the group.
        """
        node = self._node.copy()
        node[group] = other._node._get_node(group)
        return {part: OmegaConf.to_object(node[part]) for part in parts}


def to_config(node: DictConfig) -> Config:
    """The typed configuration, with interpolations resolved and every check run.

    Raises:
        UserError: A value is missing, of the wrong type, or against another.
    """
    try:
        # Hydra lets `+group.key=value` add any key; the schema, merged with plain values, does not.
        plain = cast(dict[str, Any], OmegaConf.to_container(node, resolve=False))
        for group in SCHEMAS:
            composed = OmegaConf.get_type(node[group])
            if is_dataclass(composed) and hasattr(composed, "kind"):
                check_kind(group, plain[group], composed.kind)
        check_native_components(plain)
        found = OmegaConf.to_object(OmegaConf.merge(_typed(plain), plain))
    except OmegaConfBaseException as error:
        raise UserError(explain(error)) from error
    except ValueError as error:
        raise UserError(str(error)) from error
    assert isinstance(found, Config)
    return found


def checked_config(node: DictConfig, overrides: Sequence[str]) -> Config:
    """The typed configuration of a command line, on which every key has to change something.

    Args:
        node: Composed, its interpolations not yet resolved.
        overrides: As typed.

    Raises:
        UserError: As of `to_config`, or a key that was typed is read by nobody.
    """
    config = to_config(node)
    if sentence := unread_override(node, config, overrides):
        raise UserError(sentence)
    return config


def to_plain(config: object) -> Any:
    """Dictionaries, lists, text and numbers: what goes into files and checkpoints."""
    if isinstance(config, Enum):
        return config.name
    if isinstance(config, dict):
        return {name: to_plain(value) for name, value in config.items()}
    if is_dataclass(config) and not isinstance(config, type):
        return {name: to_plain(value) for name, value in asdict(config).items()}
    return config


def write_yaml(plain: Any, path: Path) -> None:
    """A YAML file of plain data that appears whole or not at all."""
    with replacing(path) as partial:
        partial.write_text(OmegaConf.to_yaml(OmegaConf.create(plain)), encoding="utf-8")


def read_yaml(path: Path) -> Any:
    """The plain data of a YAML file; a reference to another key stays the text that it is.

    Raises:
        Exception: The file is not there or is no YAML.
    """
    return OmegaConf.to_container(OmegaConf.load(path), resolve=False)


def from_plain(plain: dict[str, Any], overrides: Mapping[str, Any] | None = None) -> DictConfig:
    """A node with the schema's types around saved values, and dotted `overrides` over them.

    Raises:
        UserError: The values do not fit the schema.
    """
    try:
        followed = {  # parts of a pretrained VLM have these from it, also where an override exchanges it
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
        for key, value in (overrides or {}).items():
            OmegaConf.update(node, key, value, merge=False)
    except OmegaConfBaseException as error:
        raise UserError(explain(error)) from error
    return node
