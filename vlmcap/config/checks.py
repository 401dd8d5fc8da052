"""Checks of single values."""

from __future__ import annotations


def require(condition: bool, message: str) -> None:
    """Raises a `ValueError` with `message` unless `condition` holds."""
    if not condition:
        raise ValueError(message)


def require_positive(group: str, values: object, *names: str) -> None:
    """Raises a `ValueError` that names the first of the fields `names` below 1."""
    for name in names:
        require(getattr(values, name) >= 1, f"{group}.{name} must be at least 1, not {getattr(values, name)}")
