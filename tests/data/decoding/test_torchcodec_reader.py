"""torchcodec gives the frames that PyAV gives; where it does not load, a stand-in that keeps its documented behaviour shows the wiring."""

from __future__ import annotations

import importlib
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace

import av
import numpy as np
import pytest
import torch
from torch import Tensor

from tests.data.decoding.test_sampling import B_FRAMES, SETTINGS, MakeFrames, make_clip
from tests.data.encoding import encode
from vlmcap.data.decoding import torchcodec_reader
from vlmcap.data.decoding.torchcodec_reader import resolve_decoder
from vlmcap.data.decoding.video import DecodeLimits, FrameSampling, VideoError, read_frames
from vlmcap.errors import UserError

CLIPS = ["variable rate", "rotated", "odd sides", "open groups", "late start", "edit list", "one frame"]


class StandInDecoder:
    """Decodes all with PyAV; times are those of the stream, a moment outside of it is refused, and rotation is applied."""

    def __init__(self, source: str | io.IOBase, *, seek_mode: str, num_ffmpeg_threads: int, device: str) -> None:
        assert (seek_mode, num_ffmpeg_threads, device) == ("exact", 1, "cpu")
        with av.open(source) as container:
            frames = list(container.decode(video=0))
            tick_s = float(container.streams.video[0].time_base or 0)
        self._starts = [(frame.pts or 0) * tick_s for frame in frames]
        end_s = self._starts[-1] + frames[-1].duration * tick_s
        pixels = [np.rot90(frame.to_ndarray(format="rgb24", threads=1), frame.rotation // 90).copy() for frame in frames]
        self._pixels = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)
        height, width = pixels[0].shape[:2]
        self.metadata = SimpleNamespace(width=width, height=height, begin_stream_seconds=self._starts[0], end_stream_seconds=end_s)

    def get_frames_played_at(self, seconds: Sequence[float]) -> SimpleNamespace:
        if not all(self.metadata.begin_stream_seconds <= moment < self.metadata.end_stream_seconds for moment in seconds):
            raise IndexError("out of bounds")
        rows = [max(i for i, start in enumerate(self._starts) if start <= moment + 1e-6) for moment in seconds]
        return SimpleNamespace(data=self._pixels[rows], pts_seconds=torch.tensor([self._starts[i] for i in rows], dtype=torch.float64))


def load_stand_in() -> ModuleType:
    module = ModuleType("torchcodec.decoders")
    module.VideoDecoder = StandInDecoder  # type: ignore[attr-defined]
    return module


@pytest.fixture(params=["stand-in", "real"])
def loaded(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if request.param == "stand-in":
        monkeypatch.setattr(torchcodec_reader, "_load", load_stand_in)
    elif isinstance(reason := torchcodec_reader._load(), str):
        pytest.skip(f"torchcodec does not load: {reason}")
    yield request.param


def psnr(a: Tensor, b: Tensor) -> float:
    error = float((a.double() - b.double()).square().mean())
    return float("inf") if error == 0 else 10 * np.log10(255**2 / error)


@pytest.mark.parametrize("sampling", SETTINGS, ids=lambda sampling: f"{sampling.kind}{sampling.jitter or ''}")
@pytest.mark.parametrize("kind", CLIPS)
def test_both_decoders_give_the_same_frames(
    tmp_path: Path, kind: str, sampling: FrameSampling, make_frames: MakeFrames, loaded: str
) -> None:
    path = make_clip(kind, tmp_path, make_frames)
    mine, other = (read_frames(str(path), sampling, rng=np.random.default_rng(0), decoder=name) for name in ("pyav", "torchcodec"))
    assert mine.shape == other.shape
    assert psnr(mine, other) > 40


def test_real_clips_are_the_same(real_clips: dict[str, Path], loaded: str) -> None:
    for name in ("bikes", "carphone_pristine"):
        mine, other = (read_frames(str(real_clips[name]), FrameSampling(num_frames=6), decoder=name_) for name_ in ("pyav", "auto"))
        assert psnr(mine, other) > 40


def test_archives_are_read_in_place(tmp_path: Path, make_frames: MakeFrames, loaded: str) -> None:
    import zipfile

    path = encode(tmp_path / "x.mp4", make_frames(30), gop=10, options=B_FRAMES)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.write(path, "x.mp4")
    frames = read_frames(f"zip://x.mp4::{tmp_path / 'a.zip'}", FrameSampling(num_frames=4), decoder="torchcodec")
    assert psnr(frames, read_frames(str(path), FrameSampling(num_frames=4))) > 40


def test_the_checks_hold_for_both(tmp_path: Path, make_frames: MakeFrames, real_clips: dict[str, Path], loaded: str) -> None:
    (tmp_path / "list.mp4").write_text("ffconcat version 1.0\nfile x.mp4\n", encoding="utf-8")
    encode(tmp_path / "x.mp4", make_frames(8))
    with pytest.raises(VideoError, match=r"list\.mp4 cannot be read"):
        read_frames(str(tmp_path / "list.mp4"), FrameSampling(), decoder="torchcodec")
    with pytest.raises(VideoError, match="outside the allowed 1 to 1000 pixels"):
        read_frames(str(real_clips["bikes"]), FrameSampling(), limits=DecodeLimits(max_pixels=1000), decoder="torchcodec")
    whole = encode(tmp_path / "cut.mp4", make_frames(250), container_options={"movflags": "+faststart"}).read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(VideoError, match=r"cut\.mp4 cannot be read"):
        read_frames(str(tmp_path / "cut.mp4"), FrameSampling(), decoder="torchcodec")


def test_what_fails_inside_is_one_sentence(real_clips: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("no such thing\nand a long trace")

    monkeypatch.setattr(torchcodec_reader, "_load", load_stand_in)
    monkeypatch.setattr(StandInDecoder, "get_frames_played_at", fail)
    with pytest.raises(VideoError, match=r"^bikes\.mp4 cannot be read: torchcodec cannot decode it \(no such thing\)$"):
        read_frames(str(real_clips["bikes"]), FrameSampling(), decoder="torchcodec")


def test_without_torchcodec(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> ModuleType:
        raise RuntimeError("Could not load libtorchcodec\nand a long trace")

    monkeypatch.setattr(importlib, "import_module", fail)
    torchcodec_reader._load.cache_clear()
    try:
        assert resolve_decoder("auto") == "pyav"
        with pytest.raises(UserError, match=r"data\.decoder=torchcodec cannot be used.*Could not load libtorchcodec\).*data\.decoder=pyav"):
            resolve_decoder("torchcodec")
    finally:
        torchcodec_reader._load.cache_clear()
    with pytest.raises(ValueError, match="decoder"):
        resolve_decoder("opencv")
