"""Decoding gives the frames that are on screen at the wanted moments, whatever the file, and says so when it cannot."""

from __future__ import annotations

import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from tests.data.encoding import Frames, decode_all, encode
from vlmcap.config import DataConfig
from vlmcap.data.decoding import frame_reader
from vlmcap.data.decoding.container import MediaFile
from vlmcap.data.decoding.display import to_rgb
from vlmcap.data.decoding.sampling import uniform_moments
from vlmcap.data.decoding.video import DecodeLimits, VideoError, decode_frames, read_frames, write_video


def centres(num_all: int, num_frames: int) -> list[int]:
    return [(2 * i + 1) * num_all // (2 * num_frames) for i in range(num_frames)]


def as_images(path: Path, num_frames: int) -> Frames:
    return decode_frames(path, num_frames).numpy().transpose(0, 2, 3, 1)


@pytest.mark.parametrize("name", ["bigbuckbunny", "bikes", "carphone_distorted", "carphone_pristine"])
def test_sampled_frames_are_those_of_a_full_decode(
    name: str, real_clips: dict[str, Path], measure_psnr: Callable[[Frames, Frames], float]
) -> None:
    whole, sampled = decode_all(real_clips[name]), as_images(real_clips[name], 8)
    for index, frame in zip(centres(len(whole), 8), sampled, strict=True):
        assert measure_psnr(whole[index], frame) > 40


@pytest.mark.parametrize("gop", [1, 12, 250])
@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts"])
def test_key_frames_near_and_far_apart(
    tmp_path: Path, gop: int, suffix: str, make_frames: Callable[..., Frames]
) -> None:
    path = encode(tmp_path / f"x.{suffix}", make_frames(120), gop=gop)
    np.testing.assert_array_equal(as_images(path, 8), decode_all(path)[centres(120, 8)])


def test_open_groups_of_pictures(tmp_path: Path, make_frames: Callable[..., Frames]) -> None:
    options = {"crf": "10", "x264-params": "open-gop=1:bframes=3:b-adapt=0"}
    path = encode(tmp_path / "x.mp4", make_frames(120), gop=12, options=options)
    for num_frames in (5, 8, 13):
        np.testing.assert_array_equal(as_images(path, num_frames), decode_all(path)[centres(120, num_frames)])


def test_seeking_decodes_less(
    tmp_path: Path, make_frames: Callable[..., Frames], monkeypatch: pytest.MonkeyPatch
) -> None:
    num_decoded = 0
    readers: list[frame_reader.FrameReader] = []
    decode = frame_reader.FrameReader._decode

    def counting(reader: frame_reader.FrameReader, *args: object, **kwargs: object) -> object:
        nonlocal num_decoded
        readers.append(reader)
        for item in decode(reader, *args, **kwargs):  # type: ignore[arg-type]
            num_decoded += 1
            yield item

    path = encode(tmp_path / "x.mp4", make_frames(200), gop=10)
    monkeypatch.setattr(frame_reader.FrameReader, "_decode", counting)
    decode_frames(path, 4)
    assert num_decoded < 50
    num_decoded = 0
    decode_frames(encode(tmp_path / "long.mp4", make_frames(200), gop=250), 1)
    assert 100 < readers[-1].num_packets < 108  # stops behind the middle
    assert num_decoded < 80  # frames that no other leans on are left out


@pytest.mark.parametrize(("suffix", "bframes"), [("mp4", 0), ("mkv", 0), ("mkv", 3)])
def test_variable_frame_rate(tmp_path: Path, suffix: str, bframes: int, make_frames: Callable[..., Frames]) -> None:
    times = [0, 40, 80, 120, 1000, 1040, 2000, 2040, 2080, 3960]
    options = {"crf": "10", "x264-params": f"bframes={bframes}"}
    path = encode(tmp_path / f"x.{suffix}", make_frames(10), times=times, options=options)
    moments = [1000 * t for t in uniform_moments(4.0, 8)]  # 250, 750, … ms of 4 s
    expected = [max(i for i, start in enumerate(times) if start <= moment) for moment in moments]
    np.testing.assert_array_equal(as_images(path, 8), decode_all(path)[expected])


def test_a_clip_that_starts_late(tmp_path: Path, make_frames: Callable[..., Frames]) -> None:
    path = encode(tmp_path / "x.ts", make_frames(50), times=[5000 + 40 * i for i in range(50)])
    np.testing.assert_array_equal(as_images(path, 5), decode_all(path)[centres(50, 5)])


@pytest.mark.parametrize("rotation", [90, 180, -90])
def test_rotation_is_applied(tmp_path: Path, rotation: int, make_frames: Callable[..., Frames]) -> None:
    path = encode(tmp_path / "x.mp4", make_frames(6), rotation=rotation)
    upright = np.rot90(decode_all(path)[3], rotation // 90)
    frame = as_images(path, 1)[0]
    np.testing.assert_array_equal(frame, upright)
    assert frame.shape == ((64, 48, 3) if abs(rotation) == 90 else (48, 64, 3))


def test_odd_sides(
    tmp_path: Path, make_frames: Callable[..., Frames], measure_psnr: Callable[[Frames, Frames], float]
) -> None:
    frames = make_frames(9, 37, 51)
    path = encode(tmp_path / "x.mp4", frames)
    sampled = as_images(path, 3)
    assert sampled.shape == (3, 37, 51, 3)
    assert measure_psnr(sampled, frames[centres(9, 3)]) > 30


def test_one_frame_is_repeated(tmp_path: Path, make_frames: Callable[..., Frames]) -> None:
    write_video(tmp_path / "x.mp4", make_frames(1), fps=10)
    sampled = as_images(tmp_path / "x.mp4", 4)
    assert sampled.shape == (4, 48, 64, 3)
    assert (sampled == sampled[0]).all()


@pytest.mark.parametrize(
    ("suffix", "format", "options"),
    [
        ("mp4", "mp4", {"movflags": "frag_keyframe+empty_moov"}),
        ("mkv", "matroska", {"live": "1"}),
        ("h264", "h264", {}),
    ],
)
def test_a_missing_duration_is_measured(
    tmp_path: Path, suffix: str, format: str, options: dict[str, str], make_frames: Callable[..., Frames]
) -> None:
    path = encode(tmp_path / f"x.{suffix}", make_frames(40), format=format, container_options=options)
    np.testing.assert_array_equal(as_images(path, 5), decode_all(path)[centres(40, 5)])


def make_broken(kind: str, folder: Path, frames: Frames) -> Path:
    path = folder / "clip.mp4"
    write_video(path, frames, fps=10)
    whole = path.read_bytes()
    if kind == "missing":
        path.unlink()
    elif kind == "folder":
        path.unlink()
        path.mkdir()
    elif kind == "playlist":
        path.write_text(f"ffconcat version 1.0\nfile '{folder / 'other.mp4'}'\n", encoding="utf-8")
        write_video(folder / "other.mp4", frames, fps=10)
    elif kind == "sound":
        path.unlink()
        with av.open(str(path), "w") as container:
            stream = container.add_stream("aac", rate=16000)
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate = 16000
            container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
    else:
        cut = {
            "empty": b"",
            "text": "한글 본문이다.\n".encode() * 99,
            "half": whole[: len(whole) // 2],
            "head": whole[:300],
        }
        path.write_bytes(cut[kind])
    return path


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("missing", "no such file"),
        ("folder", "no such file"),
        ("empty", "empty"),
        ("text", "damaged, truncated or not a video"),
        ("playlist", "damaged, truncated or not a video"),
        ("half", "truncated"),
        ("head", "no video stream"),
        ("sound", "no video stream"),
    ],
)
def test_broken_files_say_why(tmp_path: Path, kind: str, reason: str, make_frames: Callable[..., Frames]) -> None:
    path = make_broken(kind, tmp_path, np.random.default_rng(0).integers(0, 255, (30, 32, 32, 3), np.uint8))
    with pytest.raises(VideoError, match=rf"^clip\.mp4 cannot be read: .*{reason}"):
        decode_frames(path, 8)


def test_a_truncated_stream_without_index(tmp_path: Path, make_frames: Callable[..., Frames]) -> None:
    path = encode(tmp_path / "x.mkv", make_frames(250))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(VideoError, match="truncated"):
        decode_frames(path, 8)


def test_too_large_frames_and_too_little_time(real_clips: dict[str, Path]) -> None:
    with pytest.raises(VideoError, match="1280x720, outside the allowed 1 to 1000 pixels"):
        decode_frames(real_clips["bigbuckbunny"], 2, limits=DecodeLimits(max_pixels=1000))
    start = time.monotonic()
    with pytest.raises(VideoError, match=r"longer than data\.decode_timeout_s"):
        read_frames(str(real_clips["bigbuckbunny"]), DataConfig(num_frames=8, decode_timeout_s=0.05))
    assert time.monotonic() - start < 2


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="counts threads as Linux shows them")
def test_frames_own_no_threads(real_clips: dict[str, Path], tmp_path: Path, make_frames: Callable[..., Frames]) -> None:
    """A forked data worker hangs for ever when it frees an object whose threads stayed behind in its parent."""

    def num_threads() -> int:
        return len(list(Path("/proc/self/task").iterdir()))

    file = MediaFile(str(real_clips["bikes"]))
    with file.open_container(10) as container:
        before = num_threads()
        frame = frame_reader.FrameReader(file, container, time.monotonic() + 10, DecodeLimits()).frame_at(5.0)
        to_rgb(frame, frame.width, frame.height)
        write_video(tmp_path / "x.mp4", make_frames(3), fps=8)
        assert num_threads() == before


def test_num_frames_must_be_positive(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="num_frames"):
        decode_frames(tmp_path / "x.mp4", 0)


def test_written_video_is_deterministic_and_close(
    tmp_path: Path, make_frames: Callable[..., Frames], measure_psnr: Callable[[Frames, Frames], float]
) -> None:
    frames = make_frames(20)
    write_video(tmp_path / "a.mp4", frames, fps=30000 / 1001, crf=10)
    for number in range(20):
        rest = [
            np.full(size, number, np.uint8) for size in range(1000, 60_000, 1000)
        ]  # memory that was used before is used again
        del rest
        write_video(tmp_path / "b.mp4", frames, fps=30000 / 1001, crf=10)
        assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
    assert measure_psnr(as_images(tmp_path / "a.mp4", 20), frames) > 25
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.mp4", "b.mp4"]
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert container.streams.video[0].average_rate == Fraction(30000, 1001)
        assert container.streams.video[0].pix_fmt == "yuv420p"


@pytest.mark.parametrize(("width", "height"), [(1280, 64), (64, 720), (1278, 718)])
def test_colours_of_a_written_video_are_read_again(tmp_path: Path, width: int, height: int) -> None:
    colours = np.array([[200, 30, 30], [30, 200, 30], [30, 30, 200]], np.uint8)
    frames = np.broadcast_to(colours[:, None, None], (3, height, width, 3))
    write_video(tmp_path / "a.mp4", frames, fps=8, crf=5)
    read = decode_frames(tmp_path / "a.mp4", 3).permute(0, 2, 3, 1).float()  # (F, 3, H, W) -> (F, H, W, 3)
    assert np.abs(read.mean(dim=(1, 2)).numpy() - colours).max() < 4


@pytest.mark.parametrize("shape", [(2, 31, 32, 3), (0, 32, 32, 3), (2, 32, 32)])
def test_frames_that_cannot_be_written(tmp_path: Path, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError):
        write_video(tmp_path / "x.mp4", np.zeros(shape, np.uint8), fps=8)
    assert not list(tmp_path.iterdir())
