"""Checks of values, and fields whose default or use depends on another key."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import field
from typing import Any


def require(condition: bool, message: str) -> None:
    """Raises a `ValueError` with `message` unless `condition` holds."""
    if not condition:
        raise ValueError(message)


def require_positive(group: str, values: object, *names: str) -> None:
    """Raises a `ValueError` for the first of the fields `names` that is below 1; None is accepted."""
    for name in names:
        value = getattr(values, name)
        require(value is None or value >= 1, f"{group}.{name} must be at least 1, not {value}")


def require_seed(key: str, seed: int) -> None:
    """Raises a `ValueError` unless every random generator accepts the seed; NumPy's accept 32 bits."""
    require(0 <= seed < 2**32, f"{key} must be at least 0 and below 4294967296, not {seed}")


def follows(source: str, default: Any) -> Any:
    """Declares a field whose default is the value of another key.

    Args:
        source: Dotted key, or text that contains `${key}`.
        default: Default of an object that is constructed in Python, where there are no other keys.
    """
    return field(default=default, metadata={"follows": source if "${" in source else f"${{{source}}}"})


def only_with(setting: str, is_read: Callable[[Any], bool], default: Any) -> Any:
    """Declares a field that is read only while other fields of its dataclass have certain values.

    Args:
        setting: Settings with which the field is read, such as "do_sample=true", separated by blanks; keys are those of
            the group.
        is_read: Function of the dataclass that returns whether the field is read.
        default: Value that means "not set".
    """
    return field(default=default, metadata={"setting": setting, "is_read": is_read})


def as_text(value: Any) -> str:
    """Formats a value as it is typed on a command line."""
    if isinstance(value, bool):
        return str(value).lower()
    return "null" if value is None else str(getattr(value, "name", value))
