"""One sentence for a mistake in a configuration: which key, whose key it is, or which one is near it."""

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
    """One sentence for a configuration error of Hydra or OmegaConf."""
    text = str(error)
    key = re.search(r"full_key: (\S+)", text)
    name = key.group(1) if key else ""
    first = text.splitlines()[0].strip().rstrip(".")
    if hint := foreign_key(name):
        return hint
    if missing := re.search(r"Could not find '([^']+)/([^'/]+)'", text):
        group, choice = missing.groups()
        if hint := foreign_key(f"{group}={choice}"):  # given in a YAML file; on the command line it is refused earlier
            return hint
        if choices := ", ".join(group_choices(group)):
            return f"there is no {group} named '{choice}'; choose {group}= one of {choices}"
        return f"{group}={choice} does not exist, and there are no files under {group}/; remove it"
    if override := getattr(error, "override", None):  # it could not be parsed
        key, _, value = override.partition("=")
        if not value:
            return f"'{override}' cannot be read as key=value; write a key, an equals sign and a value without blanks around it"
        literal = shell_quoted(f"{key}={quoted(value)}")
        return f"'{override}' cannot be read as key=value{_reason(text)}; as plain text the value is {literal}"
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
    """What a function such as `range()` says of its arguments.

    The parser's own words are of tokens, and say nothing to a user.
    """
    found = re.search(r"while evaluating '.*': (.*)", text)
    return f" ({found.group(1)})" if found else ""


def _unknown_key(key: str) -> str:
    """A sentence that says whose key this is, or which one is near it."""
    group, _, name = key.partition(".")
    kinds = {kind for kind, schema_class in SCHEMAS.get(group, {}).items() if key in _paths(schema_class, f"{group}.")}
    choices = [choice for choice in group_choices(group) if _kind_of(group, choice) in kinds]
    if not choices:
        return f"there is no key '{key}'; {_nearest(key)}"
    others = " or ".join([", ".join(choices[:-1]), choices[-1]] if len(choices) > 1 else choices)
    return f"'{name}' is no key of this {group}, but of {group}={others}; leave {key} out, or choose one of those"


def _kind_of(group: str, choice: str) -> str:
    """The kind whose schema a YAML file begins with, or the file that it begins with; a plugin's kind needs no file."""
    file = config_file(f"{group}/{choice}")
    if not file.is_file():
        return choice
    found = re.search(r"^defaults:\s*\[?[\s-]*(\w+?)(_schema)?(@\w+)?\b\]?", file.read_text(), re.MULTILINE)
    return "" if found is None else found.group(1) if found.group(2) else _kind_of(group, found.group(1))


def _nearest(key: str) -> str:
    """A hint with the nearest known keys."""
    from difflib import get_close_matches

    known = list(_paths(Config))
    leaf = key.rpartition(".")[2]
    near = [path for path in known if path.rpartition(".")[2] == leaf and leaf != "name"][
        :3
    ]  # such as trainer.precision
    near = near or get_close_matches(key, known, n=2, cutoff=0.6)
    return f"did you mean {' or '.join(near)}?" if near else "`python train.py --cfg job` lists them"


def _paths(schema_class: Any, prefix: str = "") -> Iterator[str]:
    """Dotted keys of a schema, groups included."""
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
    """The error at the root, when it says more than the wrapper around it."""
    cause = error.__cause__
    wrapper = str(error)
    if isinstance(cause, OmegaConfBaseException) and "Could not override" not in wrapper:
        return cause
    return error
