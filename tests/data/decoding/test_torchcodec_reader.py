"""torchcodec gives the frames that PyAV gives, which only a machine where it loads can show.

Without it, errors are one sentence.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.data.decoding.test_sampling import B_FRAMES, SETTINGS, MakeFrames, make_clip
from tests.data.encoding import encode
from vlmcap.config import DataConfig, Decoder
from vlmcap.data.decoding import torchcodec_reader
from vlmcap.data.decoding.torchcodec_reader import TorchcodecReader, resolve_decoder
from vlmcap.data.decoding.video import DecodeLimits, VideoError, read_frames
from vlmcap.errors import UserError

CLIPS = ["variable rate", "rotated", "odd sides", "open groups", "late start", "edit list", "one frame"]


@pytest.fixture
def loaded() -> None:
    if isinstance(reason := torchcodec_reader._load(), str):
        pytest.skip(f"torchcodec does not load: {reason}")


def psnr(a: Tensor, b: Tensor) -> float:
    error = float((a.double() - b.double()).square().mean())
    return float("inf") if error == 0 else 10 * np.log10(255**2 / error)


@pytest.mark.usefixtures("loaded")
@pytest.mark.parametrize("sampling", SETTINGS, ids=lambda data: f"{data.sampling.name}{data.augment.jitter or ''}")
@pytest.mark.parametrize("kind", CLIPS)
def test_both_decoders_give_the_same_frames(
    tmp_path: Path, kind: str, sampling: DataConfig, make_frames: MakeFrames
) -> None:
    path = make_clip(kind, tmp_path, make_frames)
    mine, other = (
        read_frames(str(path), dataclasses.replace(sampling, decoder=decoder), rng=np.random.default_rng(0))
        for decoder in (Decoder.pyav, Decoder.torchcodec)
    )
    assert mine.shape == other.shape
    assert psnr(mine, other) > 40


@pytest.mark.usefixtures("loaded")
def test_real_clips_are_the_same(real_clips: dict[str, Path]) -> None:
    for name in ("bikes", "carphone_pristine"):
        mine, other = (
            read_frames(str(real_clips[name]), DataConfig(num_frames=6, decoder=decoder))
            for decoder in (Decoder.pyav, Decoder.auto)
        )
        assert psnr(mine, other) > 40


@pytest.mark.usefixtures("loaded")
def test_archives_are_read_in_place(tmp_path: Path, make_frames: MakeFrames) -> None:
    import zipfile

    path = encode(tmp_path / "x.mp4", make_frames(30), gop=10, options=B_FRAMES)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.write(path, "x.mp4")
    frames = read_frames(f"zip://x.mp4::{tmp_path / 'a.zip'}", DataConfig(num_frames=4, decoder=Decoder.torchcodec))
    assert psnr(frames, read_frames(str(path), DataConfig(num_frames=4))) > 40


@pytest.mark.usefixtures("loaded")
def test_the_checks_hold_for_both(tmp_path: Path, make_frames: MakeFrames, real_clips: dict[str, Path]) -> None:
    (tmp_path / "list.mp4").write_text("ffconcat version 1.0\nfile x.mp4\n", encoding="utf-8")
    encode(tmp_path / "x.mp4", make_frames(8))
    with pytest.raises(VideoError, match=r"list\.mp4 cannot be read"):
        read_frames(str(tmp_path / "list.mp4"), DataConfig(decoder=Decoder.torchcodec))
    with pytest.raises(VideoError, match="outside the allowed 1 to 1000 pixels"):
        read_frames(
            str(real_clips["bikes"]), DataConfig(decoder=Decoder.torchcodec), limits=DecodeLimits(max_pixels=1000)
        )
    whole = encode(tmp_path / "cut.mp4", make_frames(250), container_options={"movflags": "+faststart"}).read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(VideoError, match=r"cut\.mp4 cannot be read"):
        read_frames(str(tmp_path / "cut.mp4"), DataConfig(decoder=Decoder.torchcodec))


class FakeDecoder:
    """Frames of one grey each, a second apart from second 2 on, numbered by their second.

    Large as those of the clip that a test reads.
    """

    metadata = SimpleNamespace(width=640, height=272, begin_stream_seconds=2.0, end_stream_seconds=12.0)

    def __init__(self, source: object, **options: object) -> None: ...

    def get_frames_played_at(self, seconds: Sequence[float]) -> SimpleNamespace:
        assert all(2.0 <= moment < 12.0 for moment in seconds)
        pts = torch.tensor(seconds, dtype=torch.float64).floor()
        return SimpleNamespace(data=pts.to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 2, 2), pts_seconds=pts)


@pytest.fixture
def faked(monkeypatch: pytest.MonkeyPatch) -> type[FakeDecoder]:
    module = ModuleType("torchcodec.decoders")
    module.VideoDecoder = FakeDecoder  # type: ignore[attr-defined]
    monkeypatch.setattr(torchcodec_reader, "_load", lambda: module)
    return FakeDecoder


@pytest.mark.usefixtures("faked")
def test_moments_are_kept_inside_the_stream_and_a_frame_comes_once() -> None:
    frames, times_s, rows = TorchcodecReader("x.mp4", 10**6).frames_at([0.0, 2.5, 3.0, 3.9, 12.0, 50.0])
    assert frames[:, 0, 0, 0].tolist() == [2, 3, 11]
    assert (times_s.tolist(), rows) == ([2.0, 3.0, 11.0], [0, 0, 1, 1, 2, 2])
    with pytest.raises(VideoError, match="outside the allowed"):
        TorchcodecReader("x.mp4", 1000)


def test_what_fails_inside_is_one_sentence(
    real_clips: dict[str, Path], faked: type[FakeDecoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise RuntimeError("no such thing\nand a long trace")

    monkeypatch.setattr(faked, "get_frames_played_at", fail)
    with pytest.raises(VideoError, match=r"^bikes\.mp4 cannot be read: torchcodec cannot decode it \(no such thing\)$"):
        read_frames(str(real_clips["bikes"]), DataConfig(decoder=Decoder.torchcodec))


def test_without_torchcodec(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> ModuleType:
        raise RuntimeError("Could not load libtorchcodec\nand a long trace")

    monkeypatch.setattr(importlib, "import_module", fail)
    torchcodec_reader._load.cache_clear()
    try:
        assert resolve_decoder(Decoder.auto) is Decoder.pyav
        with pytest.raises(
            UserError,
            match=r"data\.decoder=torchcodec cannot be used.*Could not load libtorchcodec\).*data\.decoder=pyav",
        ):
            resolve_decoder(Decoder.torchcodec)
    finally:
        torchcodec_reader._load.cache_clear()
