"""Access to values of JSON labels by dotted paths."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from vlmcap.data.text import normalize_caption

_MAX_KEYS_NAMED = 12
_MAX_KEYS_SEEN = 1000
_NO_TEXT = "no text at any key"
_KINDS = {
    bool: "true or false",
    int: "a number",
    float: "a number",
    list: "a list without text, or with other values in it",
}


class Captions(NamedTuple):
    """Normalized captions of a clip, and the number of those given that were null, empty or not text."""

    texts: tuple[str, ...]
    num_empty: int = 0


def value_at(label: Any, key: str) -> Any:
    """Returns the value at a dotted path, where a number is an index of a list; None if the path leads nowhere.

    Keys may contain dots themselves: the longest existing key that leads to a value is used.
    """
    if isinstance(label, dict):
        if key in label:
            return label[key]
        # A key may contain dots itself, so the longest prefix that exists is tried first.
        words = key.split(".")
        names = (".".join(words[:count]) for count in range(len(words) - 1, 0, -1))
        values = (value_at(label[name], key[len(name) + 1 :]) for name in names if name in label)
        return next((value for value in values if value is not None), None)
    first, _, rest = key.partition(".")
    if isinstance(label, list) and first.isdecimal() and int(first) < len(label):
        return value_at(label[int(first)], rest) if rest else label[int(first)]
    return None


def captions_at(label: Any, key: str) -> Captions:
    """Returns the captions at a dotted path, text or a list of it; null and empty items are left out and counted.

    If a list contains anything but text and null, it is not a list of captions, and there are none.
    """
    value = value_at(label, key)
    if not isinstance(value, list):
        return Captions(tuple(filter(None, [normalize_caption(value)])) if isinstance(value, str) else ())
    if not _is_texts(value):
        return Captions(())
    texts = tuple(caption for text in value if isinstance(text, str) and (caption := normalize_caption(text)))
    return Captions(texts, len(value) - len(texts))


def why_no_caption(label: Any, *keys: str) -> str:
    """Describes what is at the first key that leads to a value instead of a caption, or where else a label has text."""
    value = next((value for key in keys if (value := value_at(label, key)) is not None), None)
    if value is None:
        there = ""
    elif isinstance(value, str) or (isinstance(value, list) and value and _is_texts(value)):
        there = " (the text there is empty, or has only invisible characters)"
    else:
        there = f" (there is {_KINDS.get(type(value), 'an object')})"
    description = describe_keys(label)
    return f"{there}, {'and' if description == _NO_TEXT else 'but'} {description}"


def _is_texts(value: list[Any]) -> bool:
    return all(text is None or isinstance(text, str) for text in value)


def text_at(label: Any, key: str) -> str:
    """Returns the text or number at a dotted path as text on one line; "" if there is neither."""
    value = value_at(label, key)
    return normalize_caption(str(value)) if isinstance(value, str | int | float) and not isinstance(value, bool) else ""


def describe_keys(label: Any) -> str:
    """Describes where a label has text, for the message on a key that leads nowhere."""
    # A label of many megabytes need not be searched to its end.
    paths = [path for path, _ in zip(_text_paths(label, ""), range(_MAX_KEYS_SEEN), strict=False)]
    more = f" and {len(paths) - _MAX_KEYS_NAMED} more" if len(paths) > _MAX_KEYS_NAMED else ""
    return ("text at " + ", ".join(paths[:_MAX_KEYS_NAMED]) + more) if paths else _NO_TEXT


def _text_paths(value: Any, prefix: str) -> Iterator[str]:
    """Yields the dotted paths of all visible text in a label; a list of strings counts as one."""
    if isinstance(value, str):
        if prefix and normalize_caption(value):
            yield prefix
    elif isinstance(value, list) and value and _is_texts(value):
        if any(text and normalize_caption(text) for text in value):
            yield prefix or "0"
    elif isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            yield from _text_paths(item, f"{prefix}.{key}" if prefix else str(key))
