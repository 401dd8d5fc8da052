"""The kinds of each part, and the dataclass that is the schema of each kind's YAML; a user's own kinds are registered here as well."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

T = TypeVar("T", bound=type)

SCHEMAS: dict[str, dict[str, type]] = {}
"""Group -> kind -> dataclass."""


def register(group: str) -> Callable[[T], T]:
    """Makes a dataclass the schema of the kind that its field `kind` has by default.

    Args:
        group: Such as "projector".
    """

    def decorate(schema: T) -> T:
        SCHEMAS.setdefault(group, {})[schema.kind] = schema  # type: ignore[attr-defined]
        return schema

    return decorate


def schema_of(group: str, kind: str) -> type:
    """The dataclass of a kind.

    Raises:
        ValueError: The group has no such kind.
    """
    known = SCHEMAS[group]
    if kind not in known:
        raise ValueError(f"{group}.kind={kind} is unknown; the kinds are {', '.join(known)}")
    return known[kind]


def check_kind(group: str, plain: Mapping[str, Any], kind: str) -> None:
    """Raises a `ValueError` where `kind` was changed beside a part's name: another kind has other keys.

    Args:
        group: Such as "projector".
        plain: The group's values.
        kind: That of its schema.
    """
    if plain["kind"] != kind:
        chosen = f"{group}={plain.get('name', kind)}"
        raise ValueError(f"{group}.kind={plain['kind']} cannot be set beside {chosen}, whose kind is {kind}; choose another {group}=NAME")
