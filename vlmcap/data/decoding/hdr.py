"""High dynamic range to the range of a normal screen.

BaseCheckpoints: ITU-R BT.2100 (PQ and HLG), BT.2408 (203 cd/m² is the white of a page), BT.2087 (BT.2020 to BT.709).
"""

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import NDArray

_WHITE_NITS, _PEAK_NITS = 203.0, 1000.0
_KNEE = 0.5  # share of white up to which brightness stays as it is
_LUMA = np.asarray((0.2627, 0.6780, 0.0593), np.float32)  # BT.2020
_TO_BT709 = np.asarray(((1.6605, -0.5876, -0.0728), (-0.1246, 1.1329, -0.0083), (-0.0182, -0.1006, 1.1187)), np.float32)
_GAMMA = 2.2
_LEVELS = 4096  # of the table that encodes
_ROWS = 64  # converted at a time: as float32 in the processor's cache


def to_sdr(pixels: NDArray[np.uint16], *, is_hlg: bool) -> NDArray[np.uint8]:
    """uint16 (H, W, 3) RGB of BT.2020 with the curve of PQ or HLG -> uint8 (H, W, 3) RGB of BT.709.

    Up to half of white the brightness stays; above, all up to 1000 cd/m² is rolled off below the screen's maximum. Hues
    stay.
    """
    decode, encode = (_decode_hlg if is_hlg else _decode_pq)(), _encode_table()
    shown = np.empty(pixels.shape, np.uint8)
    for top in range(0, len(pixels), _ROWS):
        light = decode[pixels[top : top + _ROWS]]
        if is_hlg:  # the scene's light becomes the screen's, brighter parts more than darker ones
            light *= np.maximum(light @ _LUMA, 1e-6)[..., None] ** np.float32(0.2)
            light *= np.float32(_PEAK_NITS / _WHITE_NITS)
        light = np.maximum(light @ _TO_BT709.T, 0)
        brightest = np.maximum(light.max(axis=-1, keepdims=True), 1e-6)
        light *= _roll_off(brightest) / brightest
        shown[top : top + _ROWS] = encode[(light * (_LEVELS - 1) + 0.5).astype(np.int32)]
    return shown


def _roll_off(light: NDArray[np.float32]) -> NDArray[np.float32]:
    """Light, 1 being white, to 0 to 1: extended Reinhard above the knee, without a kink."""
    largest = (_PEAK_NITS / _WHITE_NITS - _KNEE) / (1 - _KNEE)
    above = np.clip((light - _KNEE) / (1 - _KNEE), 0, largest)
    rolled = above * (1 + above / largest**2) / (1 + above)
    return np.where(light > _KNEE, _KNEE + (1 - _KNEE) * rolled, light).astype(np.float32)


@functools.cache
def _decode_pq() -> NDArray[np.float32]:
    """Light of each 16-bit value, 1 being white."""
    m1, m2, c1, c2, c3 = 2610 / 16384, 2523 / 32, 3424 / 4096, 2413 / 128, 2392 / 128
    power = np.linspace(0, 1, 1 << 16) ** (1 / m2)
    nits = 10_000 * (np.maximum(power - c1, 0) / (c2 - c3 * power)) ** (1 / m1)
    return (nits / _WHITE_NITS).astype(np.float32)


@functools.cache
def _decode_hlg() -> NDArray[np.float32]:
    """Light of the scene for each 16-bit value, 0 to 1."""
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    signal = np.linspace(0, 1, 1 << 16)
    return np.where(signal <= 0.5, signal**2 / 3, (np.exp((signal - c) / a) + b) / 12).astype(np.float32)


@functools.cache
def _encode_table() -> NDArray[np.uint8]:
    return np.round(255 * np.linspace(0, 1, _LEVELS) ** (1 / _GAMMA)).astype(np.uint8)
