"""Things that are made once and only read."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

_made: dict[str, Any] = {}


def once(key: Any, make: Callable[[], Any]) -> Any:
    """What was made of a key's plain data, made at its first use."""
    text = json.dumps(key, sort_keys=True, default=str)
    if text not in _made:
        _made[text] = make()
    return _made[text]
