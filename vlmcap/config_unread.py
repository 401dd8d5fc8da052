"""Refuses overrides that have no effect on the run or sweep of their command line."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any, get_type_hints

from omegaconf import DictConfig, OmegaConf

from vlmcap.config import BasicLauncherConfig, Config, GridSweepConfig
from vlmcap.config.checks import as_text
from vlmcap.config.kinds import SCHEMAS
from vlmcap.config.unread import default_at, unread_keys, value_at
from vlmcap.errors import UserError
from vlmcap.overrides import key_of

NO_DATA = "data.root=unset"  # override for programs that need a configuration but no clips
# Keys that are only defaults of other keys, with a function that returns whether something else reads them.
_SOURCES: dict[str, Callable[[Config], bool]] = {
    f"hardware.{name}": lambda config: False
    for name in ("num_frames", "batch_size", "accumulate_grad_batches", "image_size", "frame_stack", "quantization")
} | {
    "hardware.num_workers": lambda config: False,
    "hardware.attention": lambda config: not config.is_pretrained_vlm,  # "auto" also applies to the encoder
    "encoder.is_cached": lambda config: config.cache.enabled is not False,  # small features need no workers
}


def unread_override(node: DictConfig, config: Config, overrides: Sequence[str]) -> str:
    """Returns a sentence about the first key of the command line that nothing reads; "" if all are read.

    Args:
        node: Composed configuration before interpolations are resolved.
        config: Typed configuration.
        overrides: Overrides as typed on the command line.
    """
    unread = unread_keys(config)
    plain = OmegaConf.to_container(node, resolve=False)
    # Values of the finished configuration, in which the last override of a key counts.
    for key in dict.fromkeys(key_of(override) for override in overrides):
        value = value_at(config, key)
        if key in unread and value != default_at(config, key):
            return f"{key}={as_text(value)} has no effect {unread[key]}"
        if (
            key in _SOURCES
            and not _SOURCES[key](config)
            and (sentence := _unfollowed(key, value, config, plain, unread))
        ):
            return sentence
    typed_root = any(key_of(override) == "data.root" and override != NO_DATA for override in overrides)
    if typed_root and config.data.is_demo and config.data.root != default_at(config, "data.root"):
        return (
            f"data.root={config.data.root} has no effect in data={config.data.name}, whose clips are rendered under "
            "paths.cache_dir; choose another data=NAME, or leave data.root out"
        )
    return ""


def _unfollowed(key: str, value: Any, config: Config, plain: Any, unread: dict[str, str]) -> str:
    """Returns a sentence if nothing follows a key that is only a default of other keys; "" otherwise."""
    # 1. A key that refers to it and is read: the override has an effect.
    followers = _followers()[key]
    places = set(_places(plain, f"${{{key}}}"))
    if places - unread.keys():
        return ""
    # 2. The followers that the chosen kinds have.
    there = [
        one
        for one in followers
        if one.partition(".")[2] in {field.name for field in fields(getattr(config, one.partition(".")[0]))}
    ]
    if there and there[0] in places:
        # The reason names the key that follows; the user typed the one that is followed.
        why = unread[there[0]].replace(there[0], key)
        return f"{key}={as_text(value)} has no effect, because {there[0]} has none {why}"
    if any(value_at(config, one) == value for one in there):
        return ""
    if not there and value == default_at(config, key):
        return ""
    # 3. Nothing follows it: the chosen kind lacks the key, or the key has a value of its own.
    if not there:
        group = followers[0].partition(".")[0]
        chosen = f"{group}={getattr(config, group).name}"
        return f"{key}={as_text(value)} has no effect with {chosen}, which has no such key; leave {key} out"
    chosen = f"{there[0]}={as_text(value_at(config, there[0]))}"
    return f"{key}={as_text(value)} has no effect beside {chosen}; set {there[0]}, or leave {key} out"


def _places(values: Any, text: str, prefix: str = "") -> Iterator[str]:
    """Yields the dotted keys of the values that contain a text."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _places(value, text, f"{prefix}{name}.")
        elif isinstance(value, str) and text in value:
            yield f"{prefix}{name}"


@cache
def _followers() -> dict[str, list[str]]:
    """Returns, for each key of `_SOURCES`, the keys that follow it in any kind of their group."""
    followers: dict[str, list[str]] = {key: [] for key in _SOURCES}
    for group, kind in get_type_hints(Config).items():
        for schema in SCHEMAS.get(group, {"": kind}).values():
            for field in fields(schema) if is_dataclass(schema) else ():
                source = field.metadata.get("follows", "")[2:-1]
                if source in followers and f"{group}.{field.name}" not in followers[source]:
                    followers[source].append(f"{group}.{field.name}")
    return followers


def check_single_run(overrides: Sequence[str], config: Config) -> None:
    """Refuses settings of a sweep for a single run or plan, unless they are the defaults.

    Args:
        overrides: Overrides as typed on the command line.
        config: Typed configuration.

    Raises:
        UserError: A setting has no effect.
    """
    defaults: dict[str, Any] = {"sweep": GridSweepConfig(), "launcher": BasicLauncherConfig()}
    for override in reversed(overrides):  # the last override of a key counts
        group, _, name = key_of(override).partition(".")
        if group not in defaults:
            continue
        chosen = getattr(config, group)
        known = {field.name: field.default for field in fields(chosen)}
        if (getattr(chosen, name) != known[name]) if name else (chosen != defaults[group]):
            raise UserError(f"{override} has no effect without -m; add -m to run a sweep, or leave it out")


def check_training(overrides: Sequence[str], config: Config) -> None:
    """Refuses settings that only `evaluate.py` reads.

    Args:
        overrides: Overrides as typed on the command line.
        config: Typed configuration.

    Raises:
        UserError: A setting has no effect in training.
    """
    for override in overrides:
        key = key_of(override)
        if key == "data.split" and config.data.split is not default_at(config, key):
            raise UserError(
                f"{override} has no effect in training, which scores val and test; pass it to evaluate.py, or leave "
                "it out"
            )
        if (
            key == "evaluation.max_final_clips"
            and config.trainer.overfit
            and config.evaluation.max_final_clips is not None
        ):
            raise UserError(
                f"{override} has no effect with trainer.overfit=true, which scores the clips of data.max_clips; "
                "leave it out"
            )
