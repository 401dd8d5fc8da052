"""Conversion of high dynamic range video to standard dynamic range.

Sources: ITU-R BT.2100 (PQ and HLG), BT.2408 (reference white at 203 cd/m²), BT.2087 (BT.2020 to BT.709).
"""

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import NDArray

_WHITE_NITS, _PEAK_NITS = 203.0, 1000.0
_KNEE = 0.5  # share of white up to which brightness is unchanged
_LUMA = np.asarray((0.2627, 0.6780, 0.0593), np.float32)  # BT.2020
_TO_BT709 = np.asarray(((1.6605, -0.5876, -0.0728), (-0.1246, 1.1329, -0.0083), (-0.0182, -0.1006, 1.1187)), np.float32)
_GAMMA = 2.2
_LEVELS = 4096  # entries of the encoding table
_NUM_ROWS = 64  # image rows converted at a time, as float32 in the processor's cache


def to_sdr(pixels: NDArray[np.uint16], *, is_hlg: bool) -> NDArray[np.uint8]:
    """Converts BT.2020 RGB with the curve of PQ or HLG, uint16 (H, W, 3), to BT.709 RGB, uint8 (H, W, 3).

    Brightness is kept up to half of white; above it, everything up to 1000 cd/m² is compressed below the screen's
    maximum. Hues are kept.
    """
    decode, encode = (_decode_hlg if is_hlg else _decode_pq)(), _encode_table()
    shown = np.empty(pixels.shape, np.uint8)
    for top in range(0, len(pixels), _NUM_ROWS):
        light = decode[pixels[top : top + _NUM_ROWS]]  # (rows, W, 3)
        if is_hlg:  # scene light to display light, which raises bright areas more than dark ones
            # HLG's system gamma of 1.2 for a display of 1000 nits, as luma^(1.2 - 1)
            light *= np.maximum(light @ _LUMA, 1e-6)[..., None] ** np.float32(0.2)
            light *= np.float32(_PEAK_NITS / _WHITE_NITS)
        light = np.maximum(light @ _TO_BT709.T, 0)
        brightest = np.maximum(light.max(axis=-1, keepdims=True), 1e-6)  # (rows, W, 1): one factor keeps the hue
        light *= _roll_off(brightest) / brightest
        shown[top : top + _NUM_ROWS] = encode[(light * (_LEVELS - 1) + 0.5).astype(np.int32)]
    return shown


def _roll_off(light: NDArray[np.float32]) -> NDArray[np.float32]:
    """Maps light, where 1 is white, to 0 to 1: extended Reinhard above the knee, with a continuous slope."""
    largest = (_PEAK_NITS / _WHITE_NITS - _KNEE) / (1 - _KNEE)
    above = np.clip((light - _KNEE) / (1 - _KNEE), 0, largest)
    rolled = above * (1 + above / largest**2) / (1 + above)
    return np.where(light > _KNEE, _KNEE + (1 - _KNEE) * rolled, light).astype(np.float32)


@functools.cache
def _decode_pq() -> NDArray[np.float32]:
    """Returns the light of each 16-bit value, where 1 is white."""
    # Constants of SMPTE ST 2084
    m1, m2, c1, c2, c3 = 2610 / 16384, 2523 / 32, 3424 / 4096, 2413 / 128, 2392 / 128
    power = np.linspace(0, 1, 1 << 16) ** (1 / m2)
    nits = 10_000 * (np.maximum(power - c1, 0) / (c2 - c3 * power)) ** (1 / m1)
    return (nits / _WHITE_NITS).astype(np.float32)


@functools.cache
def _decode_hlg() -> NDArray[np.float32]:
    """Returns the scene light of each 16-bit value, 0 to 1."""
    # Constants of ARIB STD-B67
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    signal = np.linspace(0, 1, 1 << 16)
    return np.where(signal <= 0.5, signal**2 / 3, (np.exp((signal - c) / a) + b) / 12).astype(np.float32)


@functools.cache
def _encode_table() -> NDArray[np.uint8]:
    return np.round(255 * np.linspace(0, 1, _LEVELS) ** (1 / _GAMMA)).astype(np.uint8)
