"""Values of JSON labels by dotted paths."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from vlmcap.data.text import normalize_caption

_MAX_KEYS_NAMED = 12
_MAX_KEYS_SEEN = 1000


def value_at(label: Any, key: str) -> Any:
    """The value at a dotted path, a number picking from a list; None where it leads nowhere."""
    value = label
    for part in key.split("."):
        if isinstance(value, dict):
            value = value.get(part)
        elif isinstance(value, list) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        else:
            return None
    return value


def captions_at(label: Any, key: str) -> tuple[str, ...]:
    """The captions at a dotted path, normalised; empty where the path leads nowhere or to something else than text or a list of it."""
    value = value_at(label, key)
    texts = value if isinstance(value, list) else [value]
    if not all(isinstance(text, str) for text in texts):
        return ()
    return tuple(caption for text in texts if (caption := normalize_caption(text)))


def text_at(label: Any, key: str) -> str:
    """The text or number at a dotted path as text on one line; "" where there is neither."""
    value = value_at(label, key)
    return normalize_caption(str(value)) if isinstance(value, str | int | float) and not isinstance(value, bool) else ""


def describe_keys(label: Any) -> str:
    """Where a label has text, for a message that a key leads nowhere."""
    paths = [path for path, _ in zip(_text_paths(label, ""), range(_MAX_KEYS_SEEN), strict=False)]
    more = f" and {len(paths) - _MAX_KEYS_NAMED} more" if len(paths) > _MAX_KEYS_NAMED else ""
    return ("text at " + ", ".join(paths[:_MAX_KEYS_NAMED]) + more) if paths else "no text at any key"


def _text_paths(value: Any, prefix: str) -> Iterator[str]:
    """Dotted paths of all non-empty text in a label, a list of strings counting as one."""
    if isinstance(value, str):
        if value.strip() and prefix:
            yield prefix
    elif isinstance(value, list) and value and all(isinstance(item, str) for item in value):
        yield prefix or "0"
    elif isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            yield from _text_paths(item, f"{prefix}.{key}" if prefix else str(key))
