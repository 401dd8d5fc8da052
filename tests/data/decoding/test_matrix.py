"""The frames that are read are those of a full decode, for every encoding, container and sampling.

The plain run takes a slice; `-m slow` takes all and counts them in docs/reference/video.md
(UPDATE_DOCS=1 writes the table).
"""

from __future__ import annotations

import itertools
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import pytest

from tests.data.decoding.document import check_table
from tests.data.decoding.matrix import (
    CONTAINERS,
    ENCODINGS,
    NUM_FRAMES,
    PROPERTIES,
    UnavailableError,
    Video,
    make_video,
    read_number,
)
from tests.data.encoding import Frames, on_screen
from vlmcap.config import AugmentConfig, DataConfig, Sampling
from vlmcap.data.decoding.container import DecodeLimits, MediaFile
from vlmcap.data.decoding.frame_reader import FrameReader
from vlmcap.data.decoding.sampling import choose_moments, spread
from vlmcap.data.decoding.video import read_timed_frames

SAMPLINGS = [DataConfig(sampling=kind, num_frames=5, fps=1.9) for kind in Sampling] + [
    DataConfig(sampling=Sampling.uniform, num_frames=7, augment=AugmentConfig(jitter=0.4))
]
WITH_DISPLAY = ("mp4", "mov", "mkv", "webm")  # containers that say how the picture is turned
FRAME_S, ROUNDING_S = 0.04, 0.0021  # of containers that count milliseconds
SLICE = [
    *itertools.product(["h264"], ["mp4", "ts"], PROPERTIES),
    *itertools.product(["h264"], ["mkv", "avi", "flv", "mpg"], ["variable", "late start"]),
    *itertools.product(["mpeg2"], ["mpg", "ts"], ["constant", "late start", "open GOP"]),
    *itertools.product(["h264_intra_refresh"], ["mp4", "mpg", "ts", "mkv"], ["constant"]),
    *itertools.product(["mpeg1", "mpeg4", "h263p"], ["avi", "mkv"], ["constant", "B-frames"]),
    *itertools.product(["hevc"], ["mkv", "ts"], ["open GOP"]),
    *itertools.product(["vp8"], ["webm"], ["constant", "variable", "late start", "longer sound", "rotated"]),
]


@dataclass(frozen=True)
class Decoded:
    """Return the numbers of all frames in PyAV's order, their times if PyAV knows them, and if they are rotated."""

    numbers: list[int]
    times_s: list[float] | None
    is_turned: bool


def decode(path: Path) -> Decoded | None:
    """A full decode; None if PyAV does not know what the container holds."""
    with av.open(str(path)) as container:
        if not container.streams.video or container.streams.video[0].codec_context is None:
            return None
        frames = list(container.decode(video=0))
    numbers = [read_number(np.asarray(frame.to_ndarray(format="rgb24", threads=1))) for frame in frames]
    ticks = [frame.pts for frame in frames]
    has_matrix = any(data.type.name == "DISPLAYMATRIX" for data in frames[0].side_data)
    if None in ticks or ticks != sorted(ticks):
        return Decoded(numbers, None, has_matrix)
    return Decoded(numbers, [float((tick - ticks[0]) * (frames[0].time_base or 0)) for tick in ticks], has_matrix)


def reference_times(video: Video, decoded: Decoded, encoding: str, container: str, kind: str) -> list[float] | None:
    """When the frames of a file are shown, None if nobody knows; not all containers can say what was meant."""
    if container == "mpg" and kind == "variable":  # most packets of program streams have no time
        return decoded.times_s
    if (
        container == "avi" and kind == "late start" and "h264" not in encoding
    ):  # the slots before belong to the first frame
        assert decoded.times_s is not None
        too_early_s = (
            FRAME_S if encoding == "mpeg1" else 0.0
        )  # of the first frame, to which the library gives the time of a B-frame
        return [max(0.0, time_s - too_early_s) for time_s in decoded.times_s]
    return video.times_s


def read(path: Path, sampling: DataConfig) -> tuple[list[float], float, Frames, list[float]]:
    """Returns moments and duration by the reader, and the frames (F, H, W, 3) and times, one for each moment."""
    file = MediaFile(str(path))
    with file.open_container(60) as container:
        reader = FrameReader(file, container, time.monotonic() + 60, DecodeLimits())
        moments, length_s = reader.choose_moments(sampling, np.random.default_rng(0)), reader.duration_s
    frames, times_s = read_timed_frames(str(path), sampling, rng=np.random.default_rng(0))
    assert times_s is not None and len(times_s) == len(frames)
    rows = spread(len(frames), len(moments))
    return moments, length_s, frames[rows].permute(0, 2, 3, 1).numpy(), times_s[rows].tolist()


def check(video: Video, encoding: str, container: str, kind: str) -> int:
    """How many samplings were read, each found right; 0 where PyAV cannot decode the file itself."""
    decoded = decode(video.path)
    if decoded is None:
        return 0
    assert decoded.numbers == list(range(NUM_FRAMES))
    assert decoded.is_turned == (kind in ("rotated", "mirrored") and container in WITH_DISPLAY)
    times_s = reference_times(video, decoded, encoding, container, kind)
    for sampling in SAMPLINGS:
        moments, length_s, frames, read_s = read(video.path, sampling)
        if sampling.sampling in (Sampling.uniform, Sampling.random, Sampling.fps):
            assert moments == pytest.approx(choose_moments(sampling, length_s, np.random.default_rng(0)))
        if decoded.is_turned:  # turned back, so that the numbers can be read
            frames = np.rot90(frames, -1, axes=(1, 2)) if kind == "rotated" else frames[:, :, ::-1]
        numbers = [read_number(pixels) for pixels in frames]
        if times_s is None:
            assert numbers[0] >= 0 and numbers == sorted(numbers) and read_s == sorted(read_s), sampling
            continue
        assert length_s == pytest.approx(times_s[-1] + FRAME_S, abs=ROUNDING_S), sampling
        earliest, latest = (
            on_screen(times_s, [moment + shift for moment in moments]) for shift in (-ROUNDING_S, ROUNDING_S)
        )
        assert all(number in pair for number, *pair in zip(numbers, earliest, latest, strict=True)), (
            sampling,
            numbers,
            earliest,
        )
        assert read_s == pytest.approx([times_s[number] for number in numbers], abs=ROUNDING_S), sampling
    return len(SAMPLINGS)


@pytest.mark.parametrize(("encoding", "container", "kind"), SLICE, ids=lambda value: value.replace(" ", "-"))
def test_frames_are_those_of_a_full_decode(tmp_path: Path, encoding: str, container: str, kind: str) -> None:
    try:
        video = make_video(tmp_path, encoding, container, kind)
    except UnavailableError:
        pytest.skip("there can be no such file")
    assert check(video, encoding, container, kind) == len(SAMPLINGS)


@pytest.mark.slow
def test_all_encodings_in_all_containers(tmp_path: Path) -> None:
    assert len(ENCODINGS) == 19 and len(CONTAINERS) == 8
    counts: Counter[tuple[str, str]] = Counter()
    wrong: list[str] = []
    num_reads = num_unavailable = 0
    for encoding, container, kind in itertools.product(ENCODINGS, CONTAINERS, PROPERTIES):
        try:
            video = make_video(tmp_path, encoding, container, kind)
            num_right = check(video, encoding, container, kind)
        except UnavailableError:
            num_right = 0
        except Exception as error:
            wrong.append(f"{encoding} {container} {kind}: {type(error).__name__} {str(error)[:200]}")
            continue
        num_reads += num_right
        num_unavailable += num_right == 0
        counts[container, kind] += num_right > 0
    assert not wrong, "\n".join(wrong)
    rows = ["| | " + " | ".join(PROPERTIES) + " |", "|---" * (len(PROPERTIES) + 1) + "|"]
    for container in CONTAINERS:
        rows.append(f"| {container} | " + " | ".join(str(counts[container, kind] or "–") for kind in PROPERTIES) + " |")
    rows.append(
        f"\n{sum(counts.values())} files, each read in {len(SAMPLINGS)} ways: {num_reads} readings; {num_unavailable} "
        "of the "
        f"{len(ENCODINGS) * len(CONTAINERS) * len(PROPERTIES)} combinations do not exist."
    )
    check_table("frames", "\n".join(rows))
