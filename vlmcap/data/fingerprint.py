"""Names for cached results that change whenever what they were computed from changes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from vlmcap.types import Clip

_BLOCK = 64 * 1024
_NUM_BLOCKS = 16


def cache_key(**parts: object) -> str:
    """16 hexadecimal digits of the SHA-256 of `parts` as canonical JSON: equal parts in any order give equal keys.

    Args:
        parts: Plain values: None, booleans, integers, finite floats, text, and lists, tuples and text-keyed dictionaries of them.

    Raises:
        TypeError: A value is of another type; its text might differ from run to run.
        ValueError: A float is not finite.
    """
    _refuse_odd(parts)
    text = json.dumps(parts, sort_keys=True, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _refuse_odd(value: object) -> None:
    if isinstance(value, dict):
        if not all(type(key) is str for key in value):
            raise TypeError("the keys of a part of a cache key must be text")
        for item in value.values():
            _refuse_odd(item)
    elif isinstance(value, list | tuple):
        for item in value:
            _refuse_odd(item)
    elif type(value) not in (str, int, float, bool, type(None)):
        raise TypeError(f"{value!r} of type {type(value).__name__} cannot be a part of a cache key: pass plain values")


def clip_fingerprint(path: str | Path) -> str:
    """64 hexadecimal digits for the content of a file; all zeros for one that cannot be read.

    Files up to 1 MiB are hashed whole. Of larger ones the size and 16 evenly spread blocks of 64 KiB are, the first and last among
    them: that reads 1 MiB a clip instead of all, and the table of sample sizes at one end of an MP4 differs after any new encoding.
    A byte changed in place between the blocks goes unnoticed.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        digest = hashlib.sha256(f"{size}:".encode())
        with path.open("rb") as file:
            if size <= _BLOCK * _NUM_BLOCKS:
                digest.update(file.read())
            else:
                for i in range(_NUM_BLOCKS):
                    file.seek((size - _BLOCK) * i // (_NUM_BLOCKS - 1))
                    digest.update(file.read(_BLOCK))
    except OSError:
        return "0" * 64
    return digest.hexdigest()


def clips_fingerprint(clips: Iterable[Clip]) -> str:
    """64 hexadecimal digits for the ids and video contents of a data set, whatever its order; captions do not count."""
    digest = hashlib.sha256()
    for line in sorted(f"{json.dumps(clip.id)} {clip_fingerprint(clip.video)}\n" for clip in clips):
        digest.update(line.encode())
    return digest.hexdigest()
