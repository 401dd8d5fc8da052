"""Registry of the kinds in each group: the schema of a kind's YAML file, and the class or function that builds it.

The kinds of this package and those of a user's plugin are registered in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

T = TypeVar("T", bound=type)
M = TypeVar("M")

SCHEMAS: dict[str, dict[str, type]] = {}
"""Group -> kind -> dataclass."""
MAKERS: dict[str, dict[str, Any]] = {}
"""Group -> kind -> class or function that builds the component."""


def register(group: str) -> Callable[[T], T]:
    """Registers a dataclass as the schema of the kind that is the default of its field `kind`.

    Args:
        group: Name of the group, such as "projector".

    Raises:
        ValueError: The dataclass has no kind, or another dataclass has that kind.
    """

    def decorate(schema: T) -> T:
        kind = getattr(schema, "kind", None)
        if not isinstance(kind, str) or kind in ("", "???"):
            raise ValueError(
                f"{schema.__qualname__} has no kind; give its field `kind` a default, such as kind: str = 'mine'"
            )
        claim(SCHEMAS.setdefault(group, {}), group, kind, schema)
        return schema

    return decorate


def register_component(group: str, schema: type) -> Callable[[M], M]:
    """Registers a class or a function that builds a kind of component, with the schema of its settings.

    - projector: a subclass of `Projection`.
    - encoder: a function `(settings, folder)` that returns a `FrameEncoder`, with random weights if the folder is None.
    - llm: a function `(settings, folder, *, dtype, quantization, attention, device)` that returns the language model.
    - data: a `Reader`.

    Args:
        group: "encoder", "projector", "llm" or "data".
        schema: Dataclass of the settings; the default of its field `kind` is the name of the kind.

    Raises:
        ValueError: Another component has that kind.
    """

    def decorate(maker: M) -> M:
        register(group)(schema)
        claim(MAKERS.setdefault(group, {}), group, schema.kind, maker)  # type: ignore[attr-defined]
        return maker

    return decorate


def claim(known: dict[str, Any], group: str, kind: str, component: Any) -> None:
    """Registers an object under its kind; a module that is imported again replaces its own objects."""
    before = known.get(kind)
    if before is not None and (before.__module__, before.__qualname__) != (
        component.__module__,
        component.__qualname__,
    ):
        raise ValueError(
            f"{group}={kind} of {component.__module__} is taken by {before.__module__}; choose another kind"
        )
    known[kind] = component


def maker_of(group: str, kind: str) -> Any:
    """Returns the class or function that builds a kind, or None if none is registered."""
    return MAKERS.get(group, {}).get(kind)


def schema_of(group: str, kind: str) -> type:
    """Returns the schema of a kind.

    Raises:
        ValueError: The group has no such kind.
    """
    known = SCHEMAS[group]
    if kind not in known:
        raise ValueError(f"{group}.kind={kind} is unknown; the kinds are {', '.join(known)}")
    return known[kind]


def check_kind(group: str, plain: Mapping[str, Any], kind: str) -> None:
    """Raises a `ValueError` if `kind` was overridden, because another kind has other keys.

    Args:
        group: Name of the group, such as "projector".
        plain: Values of the group as plain data.
        kind: Kind of its schema.
    """
    if plain["kind"] != kind:
        chosen = f"{group}={plain.get('name', kind)}"
        raise ValueError(
            f"{group}.kind={plain['kind']} cannot be combined with {chosen}, whose kind is {kind}; choose another "
            f"{group}=NAME"
        )
