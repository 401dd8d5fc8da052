"""Writes docs/reference/keys.md, the reference of every key, out of the dataclasses of `vlmcap.config`.

    python -m tools.keys_page            write the page
    python -m tools.keys_page --check    exit with 1 when it is not current

A key's text is the comment behind its field or, where there is none, the comment lines right above it.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import re
import sys
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import Field, dataclass, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from omegaconf import MISSING

from tools.model_page import markdown_table
from vlmcap.config import Config
from vlmcap.config.kinds import SCHEMAS

PAGE = Path(__file__).resolve().parents[1] / "docs" / "reference" / "keys.md"
HEADER = ("key", "type", "default", "")
HEAD = """# Keys

<!-- Made by `python -m tools.keys_page`; edit the dataclasses under vlmcap/config/ instead. -->

Every key that `python train.py KEY=VALUE` takes. A YAML file under `conf/` may give another value than the default on
this page; `python train.py --cfg job …` shows the values of a command. Where a group has kinds, the keys that all of
them have come first, and any other key is listed under the kinds that read it; with another kind it is refused.
*→ key* is a default that follows another key, *required* is a key that a file or the command line must set, and *only
with* names the setting without which a key is not read. [Configuration files](configuration.md) explains how the files
work together. Keys under `llm.suggested` are for files alone.

"""


@dataclass(frozen=True, slots=True)
class Key:
    """A row of the page."""

    path: str
    type: str
    default: str
    text: str

    @property
    def row(self) -> tuple[str, str, str, str]:
        """Its cells."""
        return f"`{self.path}`", self.type, self.default, self.text


def page() -> str:
    """The whole page, as it should be now."""
    hints = get_type_hints(Config)
    groups = [name for name in hints if is_dataclass(hints[name])]
    single = [key for key in keys(Config, "") if key.path not in groups and key.path.partition(".")[0] not in groups]
    sections = ["## The whole run\n\n" + markdown_table(HEADER, [key.row for key in single])]
    for group in groups:
        kinds = SCHEMAS.get(group)
        sections.append(_kinds_section(group, hints[group], kinds) if kinds else _plain_section(group, hints[group]))
    return HEAD + "\n".join(sections)


def keys(schema: type, prefix: str) -> Iterator[Key]:
    """The keys of a dataclass and of those inside it, in the order of its fields.

    Args:
        schema: Such as `LoraConfig`.
        prefix: In front of each name, such as "tuning.lora."; empty for none.
    """
    hints, texts = get_type_hints(schema), comments(schema)
    for known in fields(schema):
        path, kind = f"{prefix}{known.name}", hints[known.name]
        if is_dataclass(kind):
            yield from _inside(known, kind, f"{path}.")
            continue
        settings = [f"{prefix}{setting}" for setting in known.metadata.get("setting", "").split()]
        note = f"only with `{' '.join(settings)}`" if settings else ""
        yield Key(path, _type(kind), _default(known), "; ".join(filter(None, (texts.get(known.name, ""), note))))


def comments(schema: type) -> dict[str, str]:
    """Field name to the comment behind it or above it, inherited ones included."""
    found: dict[str, str] = {}
    for owner in reversed([one for one in schema.__mro__ if is_dataclass(one)]):
        lines = inspect.getsource(owner).splitlines()
        tree = ast.parse(inspect.cleandoc("\n".join(lines))).body[0]
        assert isinstance(tree, ast.ClassDef)
        for node in tree.body:
            if (
                isinstance(node, ast.AnnAssign)
                and isinstance(node.target, ast.Name)
                and (text := _comment(lines, node))
            ):
                found[node.target.id] = text
    return found


def _comment(lines: Sequence[str], node: ast.AnnAssign) -> str:
    assert node.end_lineno is not None and node.end_col_offset is not None
    behind = lines[node.end_lineno - 1].encode()[node.end_col_offset :].decode().strip()
    if behind.startswith("#"):
        return behind.removeprefix("#").strip()
    above: list[str] = []
    for line in reversed(lines[: node.lineno - 1]):
        if not line.strip().startswith("#"):
            break
        above.insert(0, line.strip().removeprefix("#").strip())
    return " ".join(above)


def _inside(known: Field[Any], kind: type, prefix: str) -> Iterator[Key]:
    """The keys of a dataclass in a field, with the values that this field begins with."""
    own = known.default_factory() if known.default_factory is not NO_DEFAULT else kind()
    for key in keys(kind, prefix):
        value = getattr(own, key.path.removeprefix(prefix), NO_DEFAULT)
        is_other = value is not NO_DEFAULT and "→" not in key.default and "required" not in key.default
        yield Key(key.path, key.type, _shown(value), key.text) if is_other else key


def _plain_section(group: str, schema: type) -> str:
    return (
        f"## `{group}`\n\n{_intro(schema)}\n\n{markdown_table(HEADER, [key.row for key in keys(schema, f'{group}.')])}"
    )


def _kinds_section(group: str, base: type, kinds: Mapping[str, type]) -> str:
    """What all kinds have, and then of each kind what it has besides or has otherwise."""
    common = [key for key in keys(base, f"{group}.") if key.path != f"{group}.kind"]
    title = f"## `{group}`\n\n{_intro(base)}\n\n"
    parts = [title + markdown_table(HEADER, [key.row for key in common])]
    for kind, schema in kinds.items():
        rows = [key.row for key in keys(schema, f"{group}.") if key not in common and key.path != f"{group}.kind"]
        table = f"\n\n{markdown_table(HEADER, rows)}" if rows else "\n"
        parts.append(f"### `{group}.kind={kind}`\n\n{_intro(schema)}{table}")
    return "\n".join(parts)


def _intro(schema: type) -> str:
    return " ".join((inspect.getdoc(schema) or "").split("\n\n")[0].split())


def _type(kind: Any) -> str:
    """Such as "number or null", or the names of an enum."""
    if get_origin(kind) in (Union, types.UnionType):
        return " or ".join(_type(one) for one in get_args(kind))
    if isinstance(kind, type) and issubclass(kind, Enum):
        return ", ".join(f"`{member.name}`" for member in kind)
    if get_origin(kind) is list:
        return "list"
    return {
        int: "integer",
        float: "number",
        str: "text",
        bool: "true, false",
        types.NoneType: "null",
        Any: "see the text",
    }[kind]


def _default(known: Field[Any]) -> str:
    if source := known.metadata.get("follows"):
        single = re.fullmatch(r"\$\{([\w.]+)\}", source)
        return f"→ `{single.group(1) if single else source}`"
    if known.default_factory is not NO_DEFAULT:
        return _shown(known.default_factory())
    return _shown(known.default)


def _shown(value: Any) -> str:
    """A value as a YAML file has it."""
    if value is NO_DEFAULT or (isinstance(value, str) and value == MISSING):
        return "required"
    if value == "":
        return "empty"
    if isinstance(value, Enum):
        return f"`{value.name}`"
    return f"`{'null' if value is None else str(value).lower() if isinstance(value, bool) else value}`"


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes or checks the page; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tools.keys_page", description="Write docs/reference/keys.md.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 when the page is not current")
    text = page()
    if not parser.parse_args(arguments).check:
        PAGE.write_text(text, encoding="utf-8")
    elif not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != text:
        print(f"{PAGE.name} is not current; run python -m tools.keys_page", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
