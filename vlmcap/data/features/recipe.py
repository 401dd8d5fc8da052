"""Recipe of stored features: everything they depend on, and a key that changes with it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from vlmcap.data.features.precision import stored_type

VERSION = 6
"""Version of the code that features depend on; raise it if, say, other frames are sampled under the same name."""

_DESCRIPTIVE = ("encoder_name", "revision")


@dataclass(frozen=True)
class Recipe:
    """Everything that the features of a clip depend on besides its content.

    Attributes:
        encoder: SHA-256 of the checkpoint's files; equal weights under another name or revision give equal features.
        layer: Hidden layer that the features are taken from.
        transform: Plain settings of the frame transform, image size among them.
        num_frames: Largest number of frames, F.
        sampling: Frame sampling; only kinds that give the same frames each time.
        fps: Frames per second if `sampling` goes by time.
        variable_frames: Whether images and short clips keep fewer than F frames.
        decoder: Video decoder; decoders differ in the last bit.
        pooled: Plain settings of the reducer that was applied to the features; None for the encoder's own.
        precision: Arithmetic of the encoder.
        dtype: A name in `DTYPES`; int8 has a float32 scale for each token.
        encoder_name: Origin of the checkpoint, for information only.
        revision: Revision of the checkpoint, for information only.

    Raises:
        UserError: `dtype` is not in `DTYPES`.
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
        """16 hexadecimal digits that identify the recipe."""
        return cache_key(**{name: value for name, value in self.as_dict().items() if name not in _DESCRIPTIVE})

    def as_dict(self) -> dict[str, object]:
        """Returns the recipe as plain data."""
        return asdict(self)


def cache_key(**values: object) -> str:
    """Returns 16 hexadecimal digits of the SHA-256 of `values` as canonical JSON, which does not depend on their order.

    Args:
        values: Plain values: None, booleans, integers, finite floats, text, and lists, tuples and text-keyed
            dictionaries of them.

    Raises:
        TypeError: A value has another type, whose text might differ from run to run.
        ValueError: A float is not finite.
    """
    _check_plain(values)
    # One text for equal values, as JSON without NaN and without spaces.
    text = json.dumps(values, sort_keys=True, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def is_key(text: str) -> bool:
    """Returns whether `text` can be a key, which excludes paths to elsewhere."""
    return re.fullmatch(r"[0-9a-f]{16}", text) is not None


def _check_plain(value: object) -> None:
    if isinstance(value, dict):
        if not all(type(key) is str for key in value):
            raise TypeError("dictionaries in a cache key must have text as keys")
        for item in value.values():
            _check_plain(item)
    elif isinstance(value, list | tuple):
        for item in value:
            _check_plain(item)
    elif type(value) not in (str, int, float, bool, type(None)):
        raise TypeError(f"{value!r} of type {type(value).__name__} cannot be in a cache key; pass plain values")
