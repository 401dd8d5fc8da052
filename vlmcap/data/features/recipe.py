"""What cached features depend on, and names that change whenever that does."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from vlmcap.data.features.precision import stored_type

VERSION = 6
"""Of the code that features depend on: raise it when, say, other frames are taken under the same name."""

_DESCRIPTIVE = ("encoder_name", "revision")


@dataclass(frozen=True)
class Recipe:
    """Everything that the features of a clip depend on besides its content.

    Attributes:
        encoder: SHA-256 of the checkpoint's files; the same weights under another name or revision give the same
            features.
        layer: Hidden layer that the features are taken from.
        transform: Plain settings of the frame transform, image size among them.
        num_frames: F at most.
        sampling: Which frames; only kinds that give the same frames each time.
        fps: Frames a second where `sampling` goes by time.
        variable_frames: Whether images and short clips keep fewer than F frames.
        decoder: What reads the videos; decoders differ in the last bit.
        pooled: Plain settings of the reducer that the features went through, None where they are the encoder's own.
        precision: Arithmetic that the encoder ran in.
        dtype: A key of `DTYPES`; int8 has a float32 scale for each token.
        encoder_name: For people only: where the checkpoint came from.
        revision: For people only.

    Raises:
        UserError: `dtype` is none of `DTYPES`.
    """

    encoder: str
    layer: int
    transform: Mapping[str, object]
    num_frames: int
    sampling: str
    fps: float
    variable_frames: bool
    decoder: str
    pooled: Mapping[str, object] | None
    precision: str
    dtype: str
    version: int = VERSION
    encoder_name: str = field(default="", compare=False)
    revision: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        stored_type(self.dtype)

    @property
    def key(self) -> str:
        """16 hexadecimal digits, other ones for other features."""
        return cache_key(**{name: value for name, value in self.as_dict().items() if name not in _DESCRIPTIVE})

    def as_dict(self) -> dict[str, object]:
        """Plain data."""
        return asdict(self)


def cache_key(**parts: object) -> str:
    """16 hexadecimal digits of the SHA-256 of `parts` as canonical JSON: equal parts in any order give equal keys.

    Args:
        parts: Plain values: None, booleans, integers, finite floats, text, and lists, tuples and text-keyed
            dictionaries of them.

    Raises:
        TypeError: A value is of another type; its text might differ from run to run.
        ValueError: A float is not finite.
    """
    _refuse_odd(parts)
    text = json.dumps(parts, sort_keys=True, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def is_key(text: str) -> bool:
    """Whether `text` can be a key, and so is no path to elsewhere."""
    return re.fullmatch(r"[0-9a-f]{16}", text) is not None


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
