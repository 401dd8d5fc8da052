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


def require_seed(key: str, seed: int) -> None:
    """Raises a `ValueError` unless every generator of random numbers takes the seed: NumPy's take 32 bits."""
    require(0 <= seed < 2**32, f"{key} must be at least 0 and below 4294967296, not {seed}")
