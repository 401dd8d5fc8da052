"""Videos of many encodings in many containers, whose frames show their number, so that wrong frames are noticed.

A picture is 8 x 4 cells: a white one, the number in 7 of them, the same 7 inverted, a black one, and below moving grey.
Turned or mirrored it gives no number.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.audio.stream import AudioStream
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from numpy.typing import NDArray

from tests.data.encoding import Frames

NUM_FRAMES, FPS, CELL, COLUMNS, ROWS = 60, 25, 32, 8, 4
LATE = 37  # frames before the first one of a late picture
RATE = 48000  # of the sound
BITS = 7


@dataclass(frozen=True)
class Encoding:
    """How pictures are compressed; without `b_frames` there are none to be had."""

    codec: str
    pix_fmt: str = "yuv420p"
    options: dict[str, str] = field(default_factory=dict)
    b_frames: dict[str, str] = field(default_factory=dict)
    open_gop: dict[str, str] = field(default_factory=dict)


X264, X265 = {"crf": "12", "preset": "veryfast"}, {"crf": "12", "preset": "ultrafast"}
GOOD = {"b": "4M"}
ENCODINGS = {
    "h264": Encoding(
        "libx264",
        options=X264 | {"bf": "0"},
        b_frames=X264 | {"x264-params": "bframes=3:b-adapt=0"},
        open_gop=X264 | {"x264-params": "open-gop=1:bframes=3:b-adapt=0"},
    ),
    "h264_intra_refresh": Encoding("libx264", options=X264 | {"x264-params": "intra-refresh=1:bframes=0"}),
    "h264_444": Encoding(
        "libx264", "yuv444p", X264 | {"bf": "0"}, X264 | {"x264-params": "bframes=3:b-adapt=0:b-pyramid=none"}
    ),
    "hevc": Encoding(
        "libx265",
        options=X265 | {"x265-params": "log-level=none:bframes=0"},
        b_frames=X265 | {"x265-params": "log-level=none:bframes=3:b-adapt=0:open-gop=0"},
        open_gop=X265 | {"x265-params": "log-level=none:bframes=3:b-adapt=0:open-gop=1"},
    ),
    "vp8": Encoding(
        "libvpx",
        options={"b": "2M", "deadline": "realtime", "cpu-used": "8", "auto-alt-ref": "1", "lag-in-frames": "8"},
    ),
    "vp9": Encoding("libvpx-vp9", options={"b": "2M", "deadline": "realtime", "cpu-used": "8"}),
    "av1": Encoding("libsvtav1", options={"preset": "12", "crf": "20", "svtav1-params": "lp=1"}),
    "mpeg1": Encoding("mpeg1video", options=GOOD, b_frames=GOOD | {"bf": "2"}, open_gop=GOOD | {"bf": "3"}),
    "mpeg2": Encoding("mpeg2video", options=GOOD, b_frames=GOOD | {"bf": "2"}, open_gop=GOOD | {"bf": "3"}),
    "mpeg4": Encoding("mpeg4", options=GOOD, b_frames=GOOD | {"bf": "2"}, open_gop=GOOD | {"bf": "3"}),
    "msmpeg4": Encoding("msmpeg4", options=GOOD),
    "h263p": Encoding("h263p", options=GOOD),
    "flv1": Encoding("flv", options=GOOD),
    "wmv2": Encoding("wmv2", options=GOOD),
    "mjpeg": Encoding("mjpeg", "yuvj420p", GOOD),
    "prores": Encoding("prores_ks", "yuv422p10le"),
    "dnxhr": Encoding("dnxhd", "yuv422p", {"profile": "dnxhr_sq"}),
    "ffv1": Encoding("ffv1", "yuv420p"),
    "png": Encoding("png", "rgb24"),
}
# Container to the codec of its sound.
CONTAINERS = {
    "mp4": "aac",
    "mov": "aac",
    "mkv": "aac",
    "webm": "libopus",
    "avi": "mp2",
    "flv": "aac",
    "ts": "aac",
    "mpg": "mp2",
}
PROPERTIES = ("constant", "variable", "late start", "longer sound", "B-frames", "open GOP", "rotated", "mirrored")


@dataclass(frozen=True)
class Video:
    """A file and the truth about it.

    Seconds at which frame i appears, from the first one on, and when the last one goes.
    """

    path: Path
    times_s: list[float]
    length_s: float


class UnavailableError(Exception):
    """The container does not take the encoding, or the encoding has no such property."""


def make_video(folder: Path, encoding: str, container: str, kind: str) -> Video:
    """A video of 60 frames with a key frame every 12.

    What `kind` says of the display is lost where a container has no place for it.

    Raises:
        UnavailableError: There can be no such file.
    """
    chosen = ENCODINGS[encoding]
    options = {"B-frames": chosen.b_frames, "open GOP": chosen.open_gop}.get(kind, chosen.options)
    if kind in ("B-frames", "open GOP") and not options:
        raise UnavailableError
    path = folder / f"{encoding}-{kind}.{container}"
    slots = frame_slots(kind)
    sound_s = {"late start": 4.5, "longer sound": 8.0}.get(kind, 0.0)
    try:
        with av.open(str(path), "w") as out:
            video = out.add_stream(chosen.codec, rate=FPS, options=options)
            assert isinstance(video, VideoStream)
            video.width, video.height, video.pix_fmt = COLUMNS * CELL, ROWS * CELL, chosen.pix_fmt
            video.thread_count, video.gop_size = 1, 12
            if kind == "rotated":
                video.set_display_rotation(90)
            if kind == "mirrored":
                video.set_display_rotation(0, hflip=True)
            sound = out.add_stream(CONTAINERS[container], rate=RATE) if sound_s else None
            packets: list[Packet[VideoStream] | Packet[AudioStream]] = []
            for i, slot in enumerate(slots):
                frame = VideoFrame.from_ndarray(picture(i), format="rgb24").reformat(format=chosen.pix_fmt, threads=1)
                frame.pts, frame.time_base = slot, Fraction(1, FPS)
                packets += video.encode(frame)
            packets += video.encode(None)
            if isinstance(sound, AudioStream):
                packets += silence(sound, sound_s)
            for packet in sorted(packets, key=lambda one: float((one.dts or 0) * one.time_base)):
                out.mux(packet)
    except (av.FFmpegError, ValueError) as error:
        raise UnavailableError(str(error)) from error
    return Video(path, [(slot - slots[0]) / FPS for slot in slots], (slots[-1] - slots[0] + 1) / FPS)


def frame_slots(kind: str) -> list[int]:
    """Of 1 / 25 s, in which the frames appear."""
    if kind == "variable":
        gaps = [1 + (i % 3 == 2) + 11 * (i == 20) for i in range(NUM_FRAMES - 1)]
        return [sum(gaps[:i]) for i in range(NUM_FRAMES)]
    return list(range(LATE, LATE + NUM_FRAMES)) if kind == "late start" else list(range(NUM_FRAMES))


def silence(sound: AudioStream, seconds: float) -> list[Packet[AudioStream]]:
    """Packets of silence."""
    format, layout = sound.codec_context.format.name, "stereo"
    resampler = av.AudioResampler(
        format=format, layout=layout, rate=RATE, frame_size=sound.codec_context.frame_size or 1024
    )
    packets: list[Packet[AudioStream]] = []
    for n in range(int(seconds * RATE / 1024)):
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 2048), np.int16), format="s16", layout=layout)
        frame.sample_rate, frame.pts, frame.time_base = RATE, n * 1024, Fraction(1, RATE)
        packets += [packet for part in resampler.resample(frame) for packet in sound.encode(part)]
    return packets + sound.encode(None)


def picture(number: int) -> Frames:
    """uint8 (128, 256, 3): the picture that shows `number`."""
    bits = [number >> k & 1 for k in range(BITS)]
    code = np.asarray([1, *bits, *(1 - bit for bit in bits), 0], np.uint8).reshape(2, COLUMNS)
    cells = np.kron(code * 200 + 30, np.ones((CELL, CELL), np.uint8))
    x = np.arange(COLUMNS * CELL)
    moving = np.broadcast_to((128 + 60 * np.sin((x + 3 * number) / 9)).astype(np.uint8), (2 * CELL, COLUMNS * CELL))
    return np.repeat(np.concatenate([cells, moving])[..., None], 3, axis=-1)


def read_number(pixels: NDArray[np.uint8]) -> int:
    """The number that a picture (H, W, 3) shows, -1 if none."""
    if pixels.shape[:2] != (ROWS * CELL, COLUMNS * CELL):
        return -1
    grey = pixels[..., 1].reshape(ROWS, CELL, COLUMNS, CELL)[:2, 8:-8, :, 8:-8].mean(axis=(1, 3))
    first, *code, last = (grey > 128).astype(int).ravel().tolist()
    bits, inverted = code[:BITS], code[BITS:]
    is_readable = first == 1 and last == 0 and all(a != b for a, b in zip(bits, inverted, strict=True))
    return sum(bit << k for k, bit in enumerate(bits)) if is_readable else -1
