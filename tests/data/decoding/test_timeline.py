"""Where a picture starts and ends, whatever its file says of other streams, of the end or of nothing at all."""

from __future__ import annotations

import time
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from tests.data.decoding.matrix import NUM_FRAMES, Video, make_video, picture, read_number
from tests.data.encoding import encode
from vlmcap.config import DataConfig, Sampling
from vlmcap.data.decoding.container import DecodeLimits, MediaFile, VideoError
from vlmcap.data.decoding.frame_reader import FrameReader
from vlmcap.data.decoding.video import pad_frames, read_frames, read_timed_frames

EVEN = [7, 22, 37, 52]  # the middles of four quarters of 60 frames
FOUR = DataConfig(num_frames=4)


def numbers(path: Path, sampling: DataConfig = FOUR) -> list[int]:
    return [read_number(frame.permute(1, 2, 0).numpy()) for frame in read_frames(str(path), sampling)]


def reader_of(path: Path) -> FrameReader:
    file = MediaFile(str(path))
    with file.open_container(10) as container:
        return FrameReader(file, container, time.monotonic() + 10, DecodeLimits())


def without(video: Video, *tags: bytes) -> Path:
    """The file with other names for some of its tags, as if they had not been written."""
    content = video.path.read_bytes()
    for tag in tags:
        assert tag in content
        content = content.replace(tag, b"X" + tag[1:])
    video.path.write_bytes(content)
    return video.path


@pytest.mark.parametrize("kind", ["constant", "late start", "longer sound", "B-frames"])
@pytest.mark.parametrize("container", ["mkv", "webm"])
def test_matroska_without_statistics(tmp_path: Path, container: str, kind: str) -> None:
    encoding = "h264" if container == "mkv" else "vp9"
    if kind == "B-frames" and container == "webm":
        pytest.skip("VP9 has none")
    assert numbers(without(make_video(tmp_path, encoding, container, kind), b"DURATION")) == EVEN


def test_a_tag_that_states_the_length_is_no_end(tmp_path: Path) -> None:
    """What mkvmerge writes: the end without the start."""
    video = make_video(tmp_path, "h264", "mkv", "late start")
    content = video.path.read_bytes()
    assert b"00:00:03.880000000" in content
    video.path.write_bytes(content.replace(b"00:00:03.880000000", b"00:00:02.400000000"))
    assert numbers(video.path) == EVEN


@pytest.mark.parametrize("first_ms", [500, 1500, 90_000, 4_000_000])
@pytest.mark.parametrize("suffix", ["mkv", "flv", "ts", "mpg", "mp4", "nut"])
def test_a_picture_alone_that_starts_late(tmp_path: Path, suffix: str, first_ms: int) -> None:
    if suffix in ("flv", "mpg") and first_ms > 90_000:
        pytest.skip("its clock ends before")
    frames = np.stack([picture(i) for i in range(NUM_FRAMES)])
    times = [first_ms + 40 * i for i in range(NUM_FRAMES)]
    path = encode(tmp_path / f"x.{suffix}", frames, times=times, gop=12, pix_fmt="yuv420p")
    assert numbers(path) == EVEN
    assert reader_of(path).duration_s == pytest.approx(2.4, abs=0.002)


@pytest.mark.parametrize(
    "flags", ["frag_keyframe+empty_moov", "frag_every_frame+empty_moov+default_base_moof", "frag_keyframe"]
)
@pytest.mark.parametrize("bframes", [0, 3])
def test_fragments(tmp_path: Path, flags: str, bframes: int) -> None:
    frames = np.stack([picture(i) for i in range(NUM_FRAMES)])
    options = {"crf": "12", "x264-params": f"bframes={bframes}:b-adapt=0"}
    times = [700 + 40 * i for i in range(NUM_FRAMES)]
    path = encode(
        tmp_path / "x.mp4", frames, times=times, gop=12, options=options, container_options={"movflags": flags}
    )
    for kind in (Sampling.uniform, Sampling.keyframe, Sampling.adaptive):
        assert len(set(numbers(path, DataConfig(sampling=kind, num_frames=4)))) == 4
    assert numbers(path) == EVEN


@pytest.mark.parametrize("tag", ["", "DURATION"])
@pytest.mark.parametrize("share", [0.3, 0.6])
def test_half_a_matroska_file_is_refused(tmp_path: Path, tag: str, share: float) -> None:
    frames = np.stack([picture(i % 128) for i in range(200)])
    path = encode(tmp_path / "x.mkv", frames, gop=12)
    content = path.read_bytes().replace(b"DURATION", b"XURATION") if tag else path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(VideoError, match=r"x\.mkv cannot be read: it is truncated: \d\.\d of 8\.0 seconds are missing"):
        read_frames(str(path), FOUR)


@pytest.mark.parametrize("encoding", ["h264", "mpeg2"])
def test_recordings_joined_without_new_times(tmp_path: Path, encoding: str) -> None:
    video = make_video(tmp_path, encoding, "ts", "B-frames")
    video.path.write_bytes(video.path.read_bytes() * 2)
    assert numbers(video.path, DataConfig(num_frames=8)) == EVEN + EVEN
    assert reader_of(video.path).duration_s == pytest.approx(4.8, abs=0.05)


@pytest.mark.parametrize("container", ["ts", "mpg"])
def test_a_stream_cut_within_a_group_starts_at_its_first_whole_frame(tmp_path: Path, container: str) -> None:
    video = make_video(tmp_path, "mpeg2", container, "B-frames")
    content = video.path.read_bytes()
    packet = 188 if container == "ts" else 2048
    video.path.write_bytes(content[len(content) // 3 // packet * packet :])
    with av.open(str(video.path)) as file:
        frames = list(file.decode(video=0))
    whole = [read_number(np.asarray(frame.to_ndarray(format="rgb24", threads=1))) for frame in frames]
    reader = reader_of(video.path)
    assert reader.duration_s == pytest.approx(0.04 * len(whole), abs=0.05)
    assert numbers(video.path) == [whole[(2 * i + 1) * len(whole) // 8] for i in range(4)]


def relabel(source: Path, container: str) -> Path:
    """A copy of a file that calls every frame a key frame."""
    path = source.with_name(f"relabelled.{container}")
    with av.open(str(source)) as given, av.open(str(path), "w") as out:
        stream = out.add_stream_from_template(given.streams.video[0])
        for packet in given.demux(video=0):
            if packet.dts is not None:
                packet.stream, packet.is_keyframe = stream, True
                out.mux(packet)
    return path


@pytest.mark.parametrize("kind", ["constant", "B-frames"])
@pytest.mark.parametrize(
    ("encoding", "container"), [("h264", "mp4"), ("hevc", "mkv"), ("mpeg4", "mkv"), ("h264", "flv")]
)
def test_frames_that_are_called_key_frames(tmp_path: Path, encoding: str, container: str, kind: str) -> None:
    path = relabel(make_video(tmp_path, encoding, "mp4", kind).path, container)
    for sampling in (Sampling.uniform, Sampling.random, Sampling.keyframe, Sampling.adaptive):
        frames, times_s = read_timed_frames(
            str(path), DataConfig(sampling=sampling, num_frames=6), rng=np.random.default_rng(2)
        )
        assert times_s is not None
        shown = [read_number(frame.permute(1, 2, 0).numpy()) for frame in frames]
        assert shown == [round(25 * float(moment)) for moment in times_s]
    assert numbers(path) == EVEN


@pytest.mark.parametrize("container", ["mp4", "mkv", "ts", "mpg", "avi", "flv"])
def test_seeking_where_it_does_not_pay_changes_nothing(
    tmp_path: Path, container: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    video = make_video(tmp_path, "h264", container, "B-frames")
    monkeypatch.setattr(FrameReader, "_saves_decoding", lambda *_: True)
    assert numbers(video.path, DataConfig(num_frames=10)) == list(range(3, 60, 6))


@pytest.mark.parametrize(("length_ms", "first"), [(1200, 0), (1200, 25), (800, 17), (2400, 25)])
@pytest.mark.parametrize("kind", ["constant", "B-frames"])
def test_an_edit_list_that_shows_a_part(tmp_path: Path, kind: str, length_ms: int, first: int) -> None:
    video = make_video(tmp_path, "h264", "mp4", kind)
    content = bytearray(video.path.read_bytes())
    place = content.index(b"elst") + 12  # length in milliseconds, then the first tick of the media
    tick = int.from_bytes(content[place + 4 : place + 8], "big") + 512 * first
    content[place : place + 8] = length_ms.to_bytes(4, "big") + tick.to_bytes(4, "big")
    video.path.write_bytes(content)
    num_shown = min(length_ms // 40, NUM_FRAMES - first)
    assert numbers(video.path) == [first + (2 * i + 1) * num_shown // 8 for i in range(4)]


@pytest.mark.parametrize("container", ["mp4", "mkv", "ts", "mpg"])
@pytest.mark.parametrize("kind", Sampling)
def test_periodic_intra_refresh(tmp_path: Path, container: str, kind: Sampling) -> None:
    """Its key frames only begin to build up the picture."""
    video = make_video(tmp_path, "h264_intra_refresh", container, "constant")
    found, times_s = read_timed_frames(
        str(video.path), DataConfig(sampling=kind, num_frames=6, fps=2.5), rng=np.random.default_rng(1)
    )
    assert times_s is not None
    shown = [read_number(frame.permute(1, 2, 0).numpy()) for frame in found]
    assert shown == [round(25 * float(moment)) for moment in times_s]
    assert len(set(shown)) >= 5


def test_times_are_those_of_the_frames_read(tmp_path: Path) -> None:
    video = make_video(tmp_path, "h264", "mkv", "variable")
    frames, times_s = read_timed_frames(str(video.path), FOUR)
    assert times_s is not None
    shown = [read_number(frame.permute(1, 2, 0).numpy()) for frame in frames]
    assert times_s.tolist() == pytest.approx([video.times_s[i] for i in shown], abs=0.001)
    assert pad_frames(times_s, 8).tolist() == np.repeat(times_s.numpy(), 2).tolist()


def test_images_have_no_times(tmp_path: Path) -> None:
    Image.new("RGB", (16, 16)).save(tmp_path / "x.png")
    assert read_timed_frames(str(tmp_path / "x.png"), FOUR).times_s is None
