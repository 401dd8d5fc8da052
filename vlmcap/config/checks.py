"""Checks of values, and fields whose default or meaning depends on another key."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import field
from typing import Any


def require(condition: bool, message: str) -> None:
    """Raises a `ValueError` with `message` unless `condition` holds."""
    if not condition:
        raise ValueError(message)


def require_positive(group: str, values: object, *names: str) -> None:
    """Raises a `ValueError` that names the first of the fields `names` below 1; None is not checked."""
    for name in names:
        value = getattr(values, name)
        require(value is None or value >= 1, f"{group}.{name} must be at least 1, not {value}")


def require_seed(key: str, seed: int) -> None:
    """Raises a `ValueError` unless every generator of random numbers takes the seed: NumPy's take 32 bits."""
    require(0 <= seed < 2**32, f"{key} must be at least 0 and below 4294967296, not {seed}")


def follows(source: str, default: Any) -> Any:
    """A field that has another key's value unless it is given one of its own.

    Args:
        source: Dotted key, or text with `${key}` in it.
        default: Value of an object that is constructed in Python, where there are no other keys.
    """
    return field(default=default, metadata={"follows": source if "${" in source else f"${{{source}}}"})


def only_with(setting: str, is_read: Callable[[Any], bool], default: Any) -> Any:
    """A field that is read only while another field of its dataclass has a certain value.

    Args:
        setting: What to set for the field to be read, such as "do_sample=true", with blanks between several; keys are
            those of the group.
        is_read: The dataclass -> whether it is so.
        default: Value that stands for "not set".
    """
    return field(default=default, metadata={"setting": setting, "is_read": is_read})


def as_text(value: Any) -> str:
    """A value as it is typed on a command line."""
    return (
        str(value).lower()
        if isinstance(value, bool)
        else "null"
        if value is None
        else str(getattr(value, "name", value))
    )
