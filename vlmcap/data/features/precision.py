"""Number formats of stored features, and their deviation from the encoder's output.

Legend: F frames, P patches per frame, Dv vision width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vlmcap.errors import UserError

_TYPES: dict[str, torch.dtype] = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "int8": torch.int8,
}
DTYPES = tuple(_TYPES)
_SCALE_BYTES = 4
_INT8_MAX = 127


def stored_type(dtype: str) -> torch.dtype:
    """Returns the torch type for a name in `DTYPES`; raises `UserError` for another name."""
    if dtype not in _TYPES:
        raise UserError(f"cache.dtype must be one of {', '.join(DTYPES)}, not '{dtype}'")
    return _TYPES[dtype]


def size_bytes(num_clips: int, num_frames: int, num_patches: int, embed_dim: int, dtype: str) -> int:
    """Returns the size of the features of N clips in bytes, without the header of about 150 bytes per clip."""
    token = embed_dim * stored_type(dtype).itemsize + (_SCALE_BYTES if dtype == "int8" else 0)
    return num_clips * num_frames * num_patches * token


@dataclass(frozen=True, slots=True)
class StorageDeviation:
    """Deviation of stored features from those of the encoder, relative to the root mean square of the features.

    Attributes:
        max: Largest absolute deviation of a number.
        rms: Root mean square over all numbers.
    """

    max: float
    rms: float


@dataclass(slots=True)
class ErrorSums:
    """Accumulates errors over clips and shards, so that they can be reported for a whole store."""

    worst: float = 0.0
    squared_error: float = 0.0
    squared: float = 0.0
    count: int = 0

    def add(self, other: ErrorSums) -> None:
        """Adds the errors of other numbers."""
        self.worst = max(self.worst, other.worst)
        self.squared_error += other.squared_error
        self.squared += other.squared
        self.count += other.count

    @property
    def deviation(self) -> StorageDeviation | None:
        """Deviation over all numbers so far; None if there are none, or only zeros."""
        if not self.count or self.squared == 0:
            return None
        rms = math.sqrt(self.squared / self.count)
        return StorageDeviation(self.worst / rms, math.sqrt(self.squared_error / self.count) / rms)


def quantize(features: Tensor) -> tuple[Tensor, Tensor]:
    """Quantizes to int8 numbers (..., Dv) and float32 scales (...): symmetric; a token's largest number becomes 127.

    The error of a number is at most half its token's scale, plus the rounding to float16 when it is read.
    """
    exact = features.float()
    scale = exact.abs().amax(dim=-1) / _INT8_MAX
    divisor = torch.where(scale == 0, 1, scale)  # a token of zeros
    return (exact / divisor[..., None]).round_().clamp_(-_INT8_MAX, _INT8_MAX).to(torch.int8), scale


def dequantize(numbers: Tensor, scale: Tensor) -> Tensor:
    """Returns float16 features (..., Dv)."""
    return numbers.float().mul_(scale[..., None]).half()


def is_finite(numbers: Tensor) -> bool:
    """Returns, in a single pass, whether no number is NaN or infinite."""
    # NaN and infinity both reach the smallest or the largest number.
    return bool(torch.isfinite(torch.stack(torch.aminmax(numbers))).all())


def measure(features: Tensor, read: Tensor) -> ErrorSums:
    """Measures the errors of the numbers that will be read against the features."""
    exact = features.float()
    if read is features:  # stored unchanged
        return ErrorSums(0.0, 0.0, _squared(exact), exact.numel())
    error = read.float().sub_(exact) if read.dtype != torch.float32 else read - exact
    worst = torch.stack(torch.aminmax(error)).abs().max()
    return ErrorSums(float(worst), _squared(error), _squared(exact), exact.numel())


def _squared(numbers: Tensor) -> float:
    """Returns the sum of squares, accumulated in float32 within a token and in float64 over tokens."""
    return float(torch.linalg.vector_norm(numbers, dim=-1).double().square().sum())
