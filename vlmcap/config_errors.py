"""Explains a mistake in a configuration in one sentence: the key, where it belongs, or similar keys."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any, get_args, get_origin, get_type_hints

from omegaconf.errors import OmegaConfBaseException

from vlmcap.config import Config
from vlmcap.config.kinds import SCHEMAS
from vlmcap.config_files import config_file, group_choices
from vlmcap.overrides import foreign_key, quoted, shell_quoted


def explain(error: Exception) -> str:
    """Returns one sentence for a configuration error of Hydra or OmegaConf."""
    text = str(error)
    # OmegaConf's messages end with a line such as "full_key: data.batch_size".
    key = re.search(r"full_key: (\S+)", text)
    name = key.group(1) if key else ""
    first = text.splitlines()[0].strip().rstrip(".")
    if hint := foreign_key(name):
        return hint
    # "Could not find 'encoder/xyz'" of Hydra's defaults list.
    if missing := re.search(r"Could not find '([^']+)/([^'/]+)'", text):
        group, choice = missing.groups()
        if hint := foreign_key(f"{group}={choice}"):  # given in a YAML file; on the command line it is refused earlier
            return hint
        if choices := ", ".join(group_choices(group)):
            return f"{group}={choice} does not exist; choose one of {choices}"
        return f"{group}={choice} does not exist, and there are no files under {group}/; remove it"
    if override := getattr(error, "override", None):  # it could not be parsed
        key, _, value = override.partition("=")
        if not value:
            return f"'{override}' cannot be read as key=value; write it without blanks around the equals sign"
        literal = shell_quoted(f"{key}={quoted(value)}")
        return f"'{override}' cannot be read as key=value{_reason(text)}; for plain text, write {literal}"
    # "Could not override 'data.batchsize'."
    if unknown := re.search(r"Could not override '([^']+)'", text):
        return _unknown_key(unknown.group(1))
    if "MissingMandatoryValue" in type(error).__name__ or "Missing mandatory value" in text:
        return f"{name or first} has no value; set it on the command line: {name}=…"
    if "Key '" in text and "not in" in text:
        return _unknown_key(name)
    if "ValidationError" in type(error).__name__ and name:
        return f"{name} has a wrong value: {first}"
    return first


def _reason(text: str) -> str:
    """Returns the error of a function such as `range()`; errors of the parser itself would not help a user."""
    match = re.search(r"while evaluating '.*': (.*)", text)
    return f" ({match.group(1)})" if match else ""


def _unknown_key(key: str) -> str:
    """Returns a sentence that names the kinds with this key, or similar keys."""
    group, _, name = key.partition(".")
    kinds = {kind for kind, schema_class in SCHEMAS.get(group, {}).items() if key in _paths(schema_class, f"{group}.")}
    choices = [choice for choice in group_choices(group) if _kind_of(group, choice) in kinds]
    if not choices:
        return f"there is no key '{key}'; {_nearest(key)}"
    others = " or ".join([", ".join(choices[:-1]), choices[-1]] if len(choices) > 1 else choices)
    return f"'{name}' is not a key of this {group}, only of {group}={others}; leave {key} out, or choose one of these"


def _kind_of(group: str, choice: str) -> str:
    """Returns the kind of a YAML file, by its defaults list; a plugin's kind needs no file."""
    file = config_file(f"{group}/{choice}")
    if not file.is_file():
        return choice
    # The first entry: "defaults: [patches_schema]", or "- patches_schema@encoder" below; else a file it extends.
    match = re.search(r"^defaults:\s*\[?[\s-]*(\w+?)(_schema)?(@\w+)?\b\]?", file.read_text(), re.MULTILINE)
    return "" if match is None else match.group(1) if match.group(2) else _kind_of(group, match.group(1))


def _nearest(key: str) -> str:
    """Returns a hint with the most similar known keys."""
    from difflib import get_close_matches

    known = list(_paths(Config))
    leaf = key.rpartition(".")[2]
    # Keys of other groups with the same last name, such as hardware.precision for trainer.precision.
    near = [path for path in known if path.rpartition(".")[2] == leaf and leaf != "name"][:3]
    near = near or get_close_matches(key, known, n=2, cutoff=0.6)
    return f"did you mean {' or '.join(near)}?" if near else "`python train.py --cfg job` lists all keys"


def _paths(schema_class: Any, prefix: str = "") -> Iterator[str]:
    """Yields the dotted keys of a schema, including groups."""
    hints = get_type_hints(schema_class)
    for field in fields(schema_class):
        path, kind = f"{prefix}{field.name}", hints[field.name]
        yield path
        if not prefix and field.name in SCHEMAS:
            yield from dict.fromkeys(key for node in SCHEMAS[field.name].values() for key in _paths(node, f"{path}."))
            continue
        if get_origin(kind) is dict:
            path, kind = f"{path}.<name>", get_args(kind)[1]
        if is_dataclass(kind):
            yield from _paths(kind, f"{path}.")


def innermost(error: Exception) -> Exception:
    """Returns the cause of an error if it is more specific than the error itself."""
    cause = error.__cause__
    wrapper = str(error)
    if isinstance(cause, OmegaConfBaseException) and "Could not override" not in wrapper:
        return cause
    return error
