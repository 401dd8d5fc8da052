"""Parameters of which the fast tests take a few; the others run in `make test-all`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest


def thinned(values: Iterable[Any], is_fast: Callable[[Any], bool]) -> list[Any]:
    """The values, those that are not fast marked as slow; a tuple is several arguments.

    Raises:
        AssertionError: None of them is fast, so nothing would run in `make test`.
    """
    values = list(values)
    assert any(is_fast(value) for value in values)
    return [
        value if is_fast(value) else pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.slow)
        for value in values
    ]
