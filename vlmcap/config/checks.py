"""Checks of values, and fields whose default or meaning depends on another key."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import field, fields, is_dataclass
from enum import Enum
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
        setting: What to set for the field to be read, such as "do_sample=true"; keys are relative to the group.
        is_read: The dataclass -> whether it is so.
        default: Value that stands for "not set".
    """
    return field(default=default, metadata={"setting": setting, "is_read": is_read})


def refuse_unread(group: str, values: Any) -> None:
    """Raises a `ValueError` for a field that was set although nothing reads it beside the other settings.

    Args:
        group: Dotted key of the dataclass.
        values: A dataclass, with those inside it.
    """
    for path, value, known in unread_fields(group, values):
        setting = f"{path.rpartition('.')[0]}.{known.metadata['setting']}"
        raise ValueError(f"{path}={as_text(value)} changes nothing without {setting}; set that as well, or leave {path} out")


def unread_fields(group: str, values: Any) -> Iterator[tuple[str, Any, Any]]:
    """Dotted key, value and field of what was set although nothing reads it beside the other settings.

    Args:
        group: Dotted key of the dataclass.
        values: A dataclass, with those inside it.
    """
    for path, owner, known in _fields(group, values):
        is_read, value = known.metadata.get("is_read"), getattr(owner, known.name)
        if is_read is not None and value != known.default and not is_read(owner):
            yield path, value, known


def as_text(value: Any) -> str:
    """A value as it is typed on a command line."""
    return str(value).lower() if isinstance(value, bool) else "null" if value is None else str(getattr(value, "name", value))


def _fields(group: str, values: Any) -> Iterator[tuple[str, Any, Any]]:
    """Dotted key, dataclass and field of everything below a dataclass."""
    for known in fields(values):
        path, value = f"{group}.{known.name}".lstrip("."), getattr(values, known.name)
        yield path, values, known
        if is_dataclass(value) and not isinstance(value, Enum):
            yield from _fields(path, value)
