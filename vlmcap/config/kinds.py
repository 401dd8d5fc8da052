"""The kinds of each part: the dataclass that is the schema of each kind's YAML, and the class or function that makes the part.

The package's own kinds and those of a user's plugin are registered in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

T = TypeVar("T", bound=type)
M = TypeVar("M")

SCHEMAS: dict[str, dict[str, type]] = {}
"""Group -> kind -> dataclass."""
MAKERS: dict[str, dict[str, Any]] = {}
"""Group -> kind -> what makes the part: a class or a function."""


def register(group: str) -> Callable[[T], T]:
    """Makes a dataclass the schema of the kind that its field `kind` has by default.

    Args:
        group: Such as "projector".

    Raises:
        ValueError: Another dataclass has that kind.
    """

    def decorate(schema: T) -> T:
        kind = getattr(schema, "kind", None)
        if not isinstance(kind, str) or kind in ("", "???"):
            raise ValueError(
                f"{schema.__qualname__} names no kind; give its field `kind` a default, such as kind: str = 'mine'"
            )
        claim(SCHEMAS.setdefault(group, {}), group, kind, schema)
        return schema

    return decorate


def register_component(group: str, schema: type) -> Callable[[M], M]:
    """Makes a class or a function the maker of a kind, and its dataclass the schema of that kind.

    A projector's maker is a `Projection`; an encoder's a function of settings and folder that returns a `FrameEncoder`,
    its weights random where the folder is None; a language model's a function of settings and folder, with the
    arguments dtype, quantization, attention and device; a data format's a `Reader`.

    Args:
        group: "encoder", "projector", "llm" or "data".
        schema: Dataclass of the settings, whose field `kind` names the kind by its default.

    Raises:
        ValueError: Another part has that kind.
    """

    def decorate(maker: M) -> M:
        register(group)(schema)
        claim(MAKERS.setdefault(group, {}), group, schema.kind, maker)  # type: ignore[attr-defined]
        return maker

    return decorate


def claim(known: dict[str, Any], group: str, kind: str, part: Any) -> None:
    """Enters a part under its kind; a module that is imported again replaces its own."""
    before = known.get(kind)
    if before is not None and (before.__module__, before.__qualname__) != (part.__module__, part.__qualname__):
        raise ValueError(f"{group}={kind} of {part.__module__} is taken by {before.__module__}; choose another kind")
    known[kind] = part


def maker_of(group: str, kind: str) -> Any:
    """What makes a part of a kind; None where the group has none registered for it."""
    return MAKERS.get(group, {}).get(kind)


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
        raise ValueError(
            f"{group}.kind={plain['kind']} cannot be set beside {chosen}, whose kind is {kind}; choose another "
            f"{group}=NAME"
        )
