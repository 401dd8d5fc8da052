"""Clips identified by a number, which alone determines their features, so that any process can check a read."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from vlmcap.data.features.recipe import Recipe
from vlmcap.types import Clip, GridTHW, Sample, Skipped


@dataclass
class NumberedClips:
    """N clips of F = 2, P = 4 and Dv = `width`; those in `broken` cannot be decoded.

    Attributes:
        log: File that each encoded number is appended to, also by a process that is killed later.
    """

    num_clips: int = 20
    width: int = 8
    broken: tuple[int, ...] = ()
    lost: tuple[int, ...] = ()
    batch_size: int = 3
    pause_s: float = 0.0
    log: Path | None = None

    @property
    def hashes(self) -> NDArray[np.bytes_]:
        return np.array([hashlib.sha256(str(i).encode()).hexdigest()[:32] for i in range(self.num_clips)], "S32")

    def features(self, number: int) -> Tensor:
        generator = torch.Generator().manual_seed(number)
        return torch.randn(2, 4, self.width, generator=generator) * (1 + number % 5)

    def batches(self, positions: NDArray[np.int64]) -> Iterator[list[Sample | Skipped]]:
        for start in range(0, len(positions), self.batch_size):
            yield [self.item(int(number)) for number in positions[start : start + self.batch_size]]

    def item(self, number: int) -> Sample | Skipped:
        clip = Clip(f"클립{number}", f"{number}.mp4", ("글",))
        if number in self.broken:
            return Skipped(clip, f"{number}.mp4 is broken", is_final=number not in self.lost)
        return Sample(
            clip,
            frames=torch.tensor([number // 256, number % 256, 0], dtype=torch.uint8)
            .expand(2, 4, 4, 3)
            .permute(0, 3, 1, 2),
        )

    def encode(self, frames: Tensor, grids: Sequence[GridTHW] | None = None) -> Tensor:
        numbers = [int(pixel[0]) * 256 + int(pixel[1]) for pixel in frames[:, 0, :, 0, 0]]
        time.sleep(self.pause_s)
        if self.log is not None:
            with self.log.open("ab", buffering=0) as file:
                file.write("".join(f"{number}\n" for number in numbers).encode())
        return torch.stack([self.features(number) for number in numbers])

    def encoded(self) -> list[int]:
        """Numbers that were encoded so far, in any process."""
        assert self.log is not None
        return [int(line) for line in self.log.read_text().split()] if self.log.exists() else []


@pytest.fixture
def numbered(tmp_path: Path) -> Callable[..., NumberedClips]:
    def make(num_clips: int = 20, **changes: object) -> NumberedClips:
        return NumberedClips(num_clips, **{"log": tmp_path / f"encoded-{os.getpid()}.log", **changes})  # type: ignore[arg-type]

    return make


@pytest.fixture
def make_recipe() -> Callable[..., Recipe]:
    def make(**changes: object) -> Recipe:
        encoder = {
            "encoder": "ab" * 32,
            "layer": -2,
            "transform": {"kind": "Resize", "size": 4},
            "precision": "32-true",
        }
        data = {"num_frames": 2, "sampling": "uniform", "fps": 1.0, "variable_frames": False, "decoder": "pyav"}
        return Recipe(**{**encoder, **data, "pooled": None, "dtype": "float16", **changes})  # type: ignore[arg-type]

    return make
