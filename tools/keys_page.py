"""Writes docs/reference/keys.md, the reference of all configuration keys, from the dataclasses of `vlmcap.config`.

    python -m tools.keys_page            write the page
    python -m tools.keys_page --check    exit with code 1 if the page is outdated

The description of a key is the comment behind its field, or else the comment lines directly above it.
"""

from __future__ import annotations

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

from tools.model_tables import markdown_table, page_parser, write_or_check
from vlmcap.config import Config
from vlmcap.config.kinds import SCHEMAS

PAGE = Path(__file__).resolve().parents[1] / "docs" / "reference" / "keys.md"
HEADER = ("key", "type", "default", "")
HEAD = """# Keys

<!-- Made by `python -m tools.keys_page`; edit the dataclasses under vlmcap/config/ instead. -->

All keys of `python train.py KEY=VALUE`. The files under `conf/` may set other values than the defaults listed here;
`python train.py --cfg job …` shows the values of a command. If a group has kinds, the keys of all kinds come first,
and every other key is listed with the kinds that read it; it is refused with any other kind. *→ key* is a default
that follows another key, *required* means that a file or the command line must set the key, and *only with* names the
setting that makes a key effective. [Configuration files](configuration.md) explains how the files work together. Keys
under `llm.suggested` are for files only.

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
        """Cells of the row."""
        return f"`{self.path}`", self.type, self.default, self.text


def page() -> str:
    """Returns the current text of the page."""
    hints = get_type_hints(Config)
    groups = [name for name in hints if is_dataclass(hints[name])]
    single = [key for key in keys(Config, "") if key.path not in groups and key.path.partition(".")[0] not in groups]
    sections = ["## Whole run\n\n" + markdown_table(HEADER, [key.row for key in single])]
    for group in groups:
        kinds = SCHEMAS.get(group)
        sections.append(_kinds_section(group, hints[group], kinds) if kinds else _plain_section(group, hints[group]))
    return HEAD + "\n".join(sections)


def keys(schema: type, prefix: str) -> Iterator[Key]:
    """Yields the keys of a dataclass and of nested dataclasses, in the order of the fields.

    Args:
        schema: Dataclass, such as `LoraConfig`.
        prefix: Prefix of each key, such as "tuning.lora."; may be empty.
    """
    hints, texts = get_type_hints(schema), comments(schema)
    for field in fields(schema):
        path, kind = f"{prefix}{field.name}", hints[field.name]
        if is_dataclass(kind):
            yield from _nested_keys(field, kind, f"{path}.")
            continue
        settings = [f"{prefix}{setting}" for setting in field.metadata.get("setting", "").split()]
        note = f"only with `{' '.join(settings)}`" if settings else ""
        yield Key(path, _type(kind), _default(field), "; ".join(filter(None, (texts.get(field.name, ""), note))))


def comments(schema: type) -> dict[str, str]:
    """Returns the comment behind or above each field by its name, including inherited fields."""
    texts: dict[str, str] = {}
    for owner in reversed([base for base in schema.__mro__ if is_dataclass(base)]):
        lines = inspect.getsource(owner).splitlines()
        tree = ast.parse(inspect.cleandoc("\n".join(lines))).body[0]
        assert isinstance(tree, ast.ClassDef)
        for node in tree.body:
            if (
                isinstance(node, ast.AnnAssign)
                and isinstance(node.target, ast.Name)
                and (text := _comment(lines, node))
            ):
                texts[node.target.id] = text
    return texts


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


def _nested_keys(field: Field[Any], kind: type, prefix: str) -> Iterator[Key]:
    """Yields the keys of a nested dataclass, with the defaults of the field that holds it."""
    default = field.default_factory() if field.default_factory is not NO_DEFAULT else kind()
    for key in keys(kind, prefix):
        value = getattr(default, key.path.removeprefix(prefix), NO_DEFAULT)
        has_value = value is not NO_DEFAULT and "→" not in key.default and "required" not in key.default
        yield Key(key.path, key.type, _shown(value), key.text) if has_value else key


def _plain_section(group: str, schema: type) -> str:
    return (
        f"## `{group}`\n\n{_intro(schema)}\n\n{markdown_table(HEADER, [key.row for key in keys(schema, f'{group}.')])}"
    )


def _kinds_section(group: str, base: type, kinds: Mapping[str, type]) -> str:
    """Returns a table of the keys that all kinds share, and a table per kind of its other or different keys."""
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
    """Returns the name of a type, such as "number or null", or the member names of an enum."""
    if get_origin(kind) in (Union, types.UnionType):
        return " or ".join(_type(member) for member in get_args(kind))
    if isinstance(kind, type) and issubclass(kind, Enum):
        return ", ".join(f"`{member.name}`" for member in kind)
    if get_origin(kind) is list:
        return "list"
    if is_dataclass(kind):
        return "group of keys"
    return {
        int: "integer",
        float: "number",
        str: "text",
        bool: "true, false",
        types.NoneType: "null",
        Any: "see description",
    }[kind]


def _default(field: Field[Any]) -> str:
    if source := field.metadata.get("follows"):
        single = re.fullmatch(r"\$\{([\w.]+)\}", source)
        return f"→ `{single.group(1) if single else source}`"
    if field.default_factory is not NO_DEFAULT:
        return _shown(field.default_factory())
    return _shown(field.default)


def _shown(value: Any) -> str:
    """Returns a value as written in a YAML file."""
    if value is NO_DEFAULT or (isinstance(value, str) and value == MISSING):
        return "required"
    if value == "":
        return "empty"
    if isinstance(value, Enum):
        return f"`{value.name}`"
    return f"`{'null' if value is None else str(value).lower() if isinstance(value, bool) else value}`"


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes or checks the page; returns the exit code."""
    parser = page_parser("keys_page", "Write docs/reference/keys.md.")
    return write_or_check(PAGE, page(), "keys_page", is_check=parser.parse_args(arguments).check)


if __name__ == "__main__":
    sys.exit(main())
