"""Every kind of sampling takes the frames it says, on whatever video, and decodes no more than it must."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.data.encoding import Frames, count_forced, decode_all, decode_with_times, encode, list_times, on_screen
from vlmcap.config import AugmentConfig, DataConfig, Sampling
from vlmcap.data.decoding.container import MediaFile
from vlmcap.data.decoding.frame_reader import FrameReader
from vlmcap.data.decoding.sampling import (
    adaptive_moments,
    choose_moments,
    fps_moments,
    keyframe_moments,
    spread,
    uniform_moments,
)
from vlmcap.data.decoding.video import DecodeLimits, VideoError, decode_frames, pad_frames, read_frames

MakeFrames = Callable[..., Frames]
SETTINGS = [DataConfig(sampling=kind, num_frames=5, fps=4.0) for kind in Sampling] + [
    DataConfig(sampling=Sampling.uniform, num_frames=5, augment=AugmentConfig(jitter=0.5))
]
B_FRAMES = {"crf": "10", "x264-params": "bframes=3:b-adapt=0"}
OPEN_GOPS = {"crf": "10", "x264-params": "open-gop=1:bframes=3:b-adapt=0"}


def as_images(path: Path, sampling: DataConfig, seed: int = 0) -> Frames:
    frames = pad_frames(read_frames(str(path), sampling, rng=np.random.default_rng(seed)), sampling.num_frames)
    return frames.numpy().transpose(0, 2, 3, 1)


def moments_of(path: Path, sampling: DataConfig, seed: int = 0) -> list[float]:
    file = MediaFile(str(path))
    with file.open_container(10) as container:
        reader = FrameReader(file, container, time.monotonic() + 10, DecodeLimits())
        return reader.choose_moments(sampling, np.random.default_rng(seed))


def make_clip(kind: str, folder: Path, make_frames: MakeFrames) -> Path:
    path = folder / "x.mp4"
    match kind:
        case "variable rate":
            times = list(np.cumsum([0, *([40] * 12), 700, 40, 40, 1000, *([20] * 30), 300, 40, 40, 500]))
            return encode(
                path, make_frames(len(times)), times=[int(moment) for moment in times], gop=12, options=B_FRAMES
            )
        case "rotated":
            return encode(path, make_frames(50), rotation=90, gop=12)
        case "odd sides":
            return encode(path, make_frames(50, 37, 51), gop=12)
        case "open groups":
            return encode(path, make_frames(60), gop=12, options=OPEN_GOPS)
        case "late start":
            return encode(
                path.with_suffix(".ts"),
                make_frames(50),
                times=[5000 + 40 * i for i in range(50)],
                gop=12,
                options=B_FRAMES,
            )
        case "edit list":  # the muxer writes one to hide what lies before zero
            times = [-400 + 40 * i for i in range(70)]
            return encode(path, make_frames(70), times=times, gop=12, options=B_FRAMES)
        case "no index":
            return encode(
                path.with_suffix(".mkv"), make_frames(60), gop=12, container_options={"live": "1"}, options=B_FRAMES
            )
        case _:
            return encode(path, make_frames(1))


@pytest.mark.parametrize("sampling", SETTINGS, ids=lambda data: f"{data.sampling.name}{data.augment.jitter or ''}")
@pytest.mark.parametrize(
    "kind", ["variable rate", "rotated", "odd sides", "open groups", "late start", "edit list", "no index", "one frame"]
)
def test_frames_are_those_on_screen(tmp_path: Path, kind: str, sampling: DataConfig, make_frames: MakeFrames) -> None:
    path = make_clip(kind, tmp_path, make_frames)
    whole, times_s = decode_with_times(path)
    moments = moments_of(path, sampling)
    assert len(moments) == 5 or sampling.sampling is Sampling.fps
    expected = (
        pad_frames(read_frames(str(path), sampling, rng=np.random.default_rng(0)), len(moments))
        .numpy()
        .transpose(0, 2, 3, 1)
    )
    wanted = whole[on_screen(times_s, moments)]
    np.testing.assert_array_equal(expected, np.rot90(wanted, axes=(1, 2)) if kind == "rotated" else wanted)


@pytest.mark.parametrize("name", ["bigbuckbunny", "bikes", "carphone_distorted", "carphone_pristine"])
def test_random_moments_of_real_clips_are_those_of_a_full_decode(name: str, real_clips: dict[str, Path]) -> None:
    whole, times_s = decode_with_times(real_clips[name])
    for seed, num_frames in enumerate((1, 3, 17)):
        sampling = DataConfig(sampling=Sampling.random, num_frames=num_frames)
        expected = whole[on_screen(times_s, moments_of(real_clips[name], sampling, seed))]
        np.testing.assert_array_equal(as_images(real_clips[name], sampling, seed), expected)


def test_no_more_is_decoded_than_groups_of_pictures_force(
    tmp_path: Path, make_frames: MakeFrames, real_clips: dict[str, Path]
) -> None:
    long = [encode(tmp_path / f"{gop}.mp4", make_frames(500), gop=gop, options=B_FRAMES) for gop in (60, 250)]
    for path in (*long, *real_clips.values()):
        file = MediaFile(str(path))
        with file.open_container(10) as container:
            reader = FrameReader(file, container, time.monotonic() + 10, DecodeLimits())
            moments = reader.choose_moments(DataConfig(num_frames=8), None)
            for moment_s in moments:
                reader.frame_at(moment_s)
        assert reader.num_packets <= 1.1 * count_forced(path, on_screen(list_times(path), moments)), path.name


@pytest.mark.parametrize("num_before", [37, 38, 39, 40])
def test_a_frame_shown_for_long_is_not_skipped(tmp_path: Path, num_before: int, make_frames: MakeFrames) -> None:
    """Three of four frames are non-reference frames, so the one before the pause would be skipped wherever it is."""
    times = [40 * i for i in range(num_before)] + [20_000 + 40 * i for i in range(10)]
    path = encode(tmp_path / "x.mp4", make_frames(len(times)), times=times, options=B_FRAMES)
    np.testing.assert_array_equal(as_images(path, DataConfig(num_frames=3))[1], decode_all(path)[num_before - 1])


def test_key_frames_are_taken(tmp_path: Path, make_frames: MakeFrames) -> None:
    for suffix, options in (("mp4", OPEN_GOPS), ("mp4", B_FRAMES), ("mkv", B_FRAMES), ("ts", B_FRAMES)):
        path = encode(tmp_path / f"x.{suffix}", make_frames(100), gop=10, options=options)
        np.testing.assert_array_equal(
            as_images(path, DataConfig(sampling=Sampling.keyframe, num_frames=10)), decode_all(path)[::10]
        )
        np.testing.assert_array_equal(
            as_images(path, DataConfig(sampling=Sampling.keyframe, num_frames=5)), decode_all(path)[10::20]
        )
    path = encode(tmp_path / "few.mp4", make_frames(100), gop=50)
    np.testing.assert_array_equal(
        as_images(path, DataConfig(sampling=Sampling.keyframe, num_frames=4)), decode_all(path)[[0, 25, 50, 75]]
    )


def test_key_frames_of_a_variable_rate(tmp_path: Path, make_frames: MakeFrames) -> None:
    times = [int(moment) for moment in np.cumsum(np.random.default_rng(0).integers(10, 300, 60))]
    path = encode(tmp_path / "x.mp4", make_frames(60), times=times, gop=10, options=B_FRAMES)
    np.testing.assert_array_equal(
        as_images(path, DataConfig(sampling=Sampling.keyframe, num_frames=6)), decode_all(path)[::10]
    )


@pytest.mark.parametrize("gop", [5, 250])
def test_adaptive_sampling_looks_where_the_picture_changes(tmp_path: Path, gop: int, make_frames: MakeFrames) -> None:
    still, moving = np.repeat(make_frames(1), 150, axis=0), make_frames(50)
    path = encode(tmp_path / "x.mp4", np.concatenate([still, moving]), gop=gop, options=B_FRAMES)
    moments = moments_of(path, DataConfig(sampling=Sampling.adaptive, num_frames=8))
    assert sum(moment > 6.0 for moment in moments) >= 5  # of 8 s; uniform moments would be two
    assert sum(moment < 6.0 for moment in moments) >= 1


def test_adaptive_sampling_of_a_still_clip_is_uniform(tmp_path: Path, make_frames: MakeFrames) -> None:
    path = encode(tmp_path / "x.mp4", np.repeat(make_frames(1), 50, axis=0))
    assert moments_of(path, DataConfig(sampling=Sampling.adaptive, num_frames=4)) == pytest.approx(
        uniform_moments(2.0, 4)
    )


def test_chance_needs_a_generator_and_repeats_with_it(real_clips: dict[str, Path]) -> None:
    path = real_clips["carphone_pristine"]
    for sampling in (
        DataConfig(sampling=Sampling.random, num_frames=8),
        DataConfig(sampling=Sampling.uniform, num_frames=8, augment=AugmentConfig(jitter=0.5)),
    ):
        np.testing.assert_array_equal(read_frames(str(path), sampling), decode_frames(path, 8))
        first, again, other = (as_images(path, sampling, seed) for seed in (1, 1, 2))
        np.testing.assert_array_equal(first, again)
        assert (first != other).any()


def test_sampling_by_rate_follows_the_length(tmp_path: Path, make_frames: MakeFrames) -> None:
    path = encode(tmp_path / "x.mp4", make_frames(100))  # 4 s
    np.testing.assert_array_equal(
        read_frames(str(path), DataConfig(sampling=Sampling.fps, num_frames=8, fps=1.0)).numpy().transpose(0, 2, 3, 1),
        decode_all(path)[12::25],
    )
    assert len(read_frames(str(path), DataConfig(sampling=Sampling.fps, num_frames=3, fps=2.0))) == 3
    assert len(read_frames(str(path), DataConfig(sampling=Sampling.fps, num_frames=3, fps=0.1))) == 1


def test_short_clips_give_what_they_have(tmp_path: Path, make_frames: MakeFrames) -> None:
    path = encode(tmp_path / "x.mp4", make_frames(3))
    frames = read_frames(str(path), DataConfig(num_frames=8))
    np.testing.assert_array_equal(frames.numpy().transpose(0, 2, 3, 1), decode_all(path))
    assert frames.untyped_storage().nbytes() == frames.numel()  # or the rest would travel between processes
    np.testing.assert_array_equal(pad_frames(frames, 8), frames[[0, 0, 0, 1, 1, 2, 2, 2]])
    np.testing.assert_array_equal(pad_frames(frames, 8), decode_frames(path, 8))


@pytest.mark.parametrize("sampling", SETTINGS, ids=lambda data: f"{data.sampling.name}{data.augment.jitter or ''}")
def test_a_sound_track_is_no_clip(tmp_path: Path, sampling: DataConfig) -> None:
    with av.open(str(tmp_path / "x.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with pytest.raises(VideoError, match=r"x\.mp4 cannot be read: it has no video stream"):
        read_frames(str(tmp_path / "x.mp4"), sampling)


def test_a_clip_that_claims_to_last_for_ever_is_refused(real_clips: dict[str, Path]) -> None:
    with pytest.raises(VideoError, match="header states 10 seconds, more than the allowed 9"):
        read_frames(str(real_clips["bikes"]), DataConfig(), limits=DecodeLimits(max_duration_s=9))


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"num_frames": 0}, "num_frames"),
        ({"fps": 0.0}, "fps"),
        ({"fps": float("nan")}, "fps"),
    ],
)
def test_impossible_settings(values: dict[str, object], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        DataConfig(**values)  # type: ignore[arg-type]


def test_moments() -> None:
    assert uniform_moments(4.0, 4) == [0.5, 1.5, 2.5, 3.5]
    assert uniform_moments(0.0, 2) == [0.0, 0.0]
    assert fps_moments(3.0, 1.0, 8) == [0.5, 1.5, 2.5]
    assert fps_moments(3.4, 1.0, 8) == [0.5, 1.5, 2.5]
    assert fps_moments(0.2, 1.0, 8) == [0.1]
    assert fps_moments(100.0, 1.0, 4) == [12.5, 37.5, 62.5, 87.5]
    assert keyframe_moments([0.0, 1.0, 2.0, 3.0], 4.0, 2) == [1.0, 3.0]
    assert keyframe_moments([0.0], 8.0, 4) == [0.0, 2.0, 4.0, 6.0]
    assert keyframe_moments([], 4.0, 1) == [2.0]
    assert adaptive_moments([0.0, 5.0, 10.0], [0.0, 1.0], 10.0, 10)[1:] == pytest.approx(
        [5 + (share - 0.1) / 0.18 for share in (0.15, 0.25, 0.35, 0.45, 0.55, 0.65, 0.75, 0.85, 0.95)]
    )
    assert spread(3, 8) == [0, 0, 0, 1, 1, 2, 2, 2]


@given(
    st.sampled_from([Sampling.uniform, Sampling.random, Sampling.fps]),
    st.integers(1, 40),
    st.floats(0, 1e4),
    st.floats(0.01, 100),
    st.floats(0, 0.5),
    st.integers(0, 9),
)
def test_moments_ascend_within_the_clip(
    kind: Sampling, num_frames: int, duration_s: float, fps: float, jitter: float, seed: int
) -> None:
    moments = choose_moments(
        DataConfig(sampling=kind, num_frames=num_frames, fps=fps, augment=AugmentConfig(jitter=jitter)),
        duration_s,
        np.random.default_rng(seed),
    )
    assert 1 <= len(moments) <= num_frames
    assert all(0 <= moment <= duration_s for moment in moments)
    assert all(a <= b for a, b in pairwise(moments))
    if kind is Sampling.random and jitter == 0:
        segment_s = duration_s / num_frames
        assert all(i * segment_s <= moment <= (i + 1) * segment_s for i, moment in enumerate(moments))
