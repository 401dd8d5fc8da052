"""Media is opened wherever it is, and nothing but the file asked for."""

from __future__ import annotations

import errno
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import av
import fsspec
import numpy as np
import pytest
from PIL import Image

from tests.data.encoding import Frames, encode
from vlmcap.config import DataConfig, Sampling
from vlmcap.data.decoding.video import VideoError, read_frames

B_FRAMES = {"crf": "10", "x264-params": "bframes=3:b-adapt=0"}


def packed(path: Path, kind: str) -> str:
    """The address of the content of `path` in an archive or at a remote place."""
    archive = path.with_name(f"{path.name}.{'tar' if kind == 'tar' else 'zip'}")
    if kind == "tar":
        with tarfile.open(archive, "w") as tar:
            tar.add(path, "폴더/x.mp4")
        return f"tar://폴더/x.mp4::{archive}"
    if kind == "remote":
        with fsspec.open("memory://bucket/x.mp4", "wb") as file:
            file.write(path.read_bytes())
        return "memory://bucket/x.mp4"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_STORED if kind == "stored" else zipfile.ZIP_DEFLATED) as zipped:
        zipped.write(path, "폴더/x.mp4")
    return f"zip://폴더/x.mp4::{archive}"


@pytest.mark.parametrize("kind", ["stored", "deflated", "tar", "remote"])
@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts"])
def test_archives_and_remote_files_give_the_same_frames(
    tmp_path: Path, kind: str, suffix: str, make_frames: Callable[..., Frames]
) -> None:
    path = encode(tmp_path / f"x.{suffix}", make_frames(100), gop=20, options=B_FRAMES)
    address = packed(path, kind)
    for sampling in (
        DataConfig(num_frames=6),
        DataConfig(sampling=Sampling.keyframe, num_frames=6),
        DataConfig(sampling=Sampling.adaptive, num_frames=6),
    ):
        np.testing.assert_array_equal(read_frames(address, sampling), read_frames(str(path), sampling))


def test_images_in_archives(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    for kind in ("stored", "tar"):
        frame = read_frames(packed(tmp_path / "x.png", kind), DataConfig())[0]
        np.testing.assert_array_equal(frame.permute(1, 2, 0), pixels)


PLAYLISTS = {
    "concat": "ffconcat version 1.0\nfile other.mp4\n",
    "hls": "#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\nother.mp4\n#EXT-X-ENDLIST\n",
    "dash": '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" '
    'mediaPresentationDuration="PT1S" '
    'profiles="urn:mpeg:dash:profile:isoff-on-demand:2011"><Period><AdaptationSet '
    'mimeType="video/mp4"><Representation id="1" '
    'bandwidth="1"><BaseURL>other.mp4</BaseURL></Representation></AdaptationSet></Period></MPD>',
    "rtsp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\na=rtpmap:96 "
    "H264/90000\n",
}


@pytest.mark.parametrize("kind", ["plain", "stored", "tar", "remote"])
@pytest.mark.parametrize("name", ["x.mp4", "x.m3u8", "x.mpd"])
@pytest.mark.parametrize("playlist", PLAYLISTS)
def test_playlists_lead_nowhere(
    tmp_path: Path, kind: str, name: str, playlist: str, make_frames: Callable[..., Frames]
) -> None:
    encode(tmp_path / "other.mp4", make_frames(8))
    path = tmp_path / name
    path.write_text(PLAYLISTS[playlist], encoding="utf-8")
    with pytest.raises(VideoError, match="damaged, truncated or not a video"):
        read_frames(str(path) if kind == "plain" else packed(path, kind), DataConfig(num_frames=2))


def test_numbered_pictures_lead_nowhere(tmp_path: Path) -> None:
    for i in range(3):
        Image.new("RGB", (16, 16)).save(tmp_path / f"{i}.png")
    with pytest.raises(VideoError, match="no such file"):
        read_frames(str(tmp_path / "%d.png"), DataConfig(num_frames=2))
    (tmp_path / "%d.png").write_bytes(b"\0" * 100)
    with pytest.raises(VideoError, match="damaged, truncated or not a video"):
        read_frames(str(tmp_path / "%d.png"), DataConfig(num_frames=2))


def test_what_is_missing_in_an_archive_is_named(tmp_path: Path, make_frames: Callable[..., Frames]) -> None:
    address = packed(encode(tmp_path / "x.mp4", make_frames(8)), "stored")
    with pytest.raises(VideoError, match=r"gone\.mp4"):
        read_frames(address.replace("x.mp4::", "gone.mp4::"), DataConfig())
    (tmp_path / "empty").touch()
    with pytest.raises(VideoError, match=r"x\.mp4.*the file is empty"):
        read_frames(packed(tmp_path / "empty", "stored"), DataConfig())


def test_what_another_try_may_mend_is_told_from_what_is_broken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_frames: Callable[..., Frames]
) -> None:
    path = encode(tmp_path / "x.mp4", make_frames(30), gop=10)
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video" * 100)

    def outcome(file: Path, timeout_s: float = 60.0) -> tuple[str, bool]:
        with pytest.raises(VideoError) as refused:
            read_frames(str(file), DataConfig(num_frames=4, decode_timeout_s=timeout_s))
        return str(refused.value), refused.value.is_final

    assert outcome(broken)[1]
    message, is_final = outcome(path, 1e-9)
    assert "data.decode_timeout_s" in message and not is_final

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(av, "open", fail)
    message, is_final = outcome(path)
    assert "Input/output error" in message and "damaged" not in message and not is_final
