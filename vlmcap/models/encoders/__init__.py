"""Vision encoders, one small file a family: a line here and a YAML file under `conf/encoder/` make a new one known."""

from __future__ import annotations

from collections.abc import Callable

from vlmcap.models.encoders.base import FrameTransform, VisionEncoder
from vlmcap.models.encoders.clip import load_clip
from vlmcap.models.encoders.siglip import load_siglip

LOADERS: dict[str, Callable[..., VisionEncoder]] = {"clip": load_clip, "siglip": load_siglip}

__all__ = ["LOADERS", "FrameTransform", "VisionEncoder"]
