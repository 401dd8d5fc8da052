"""Videos with what `write_video` does not offer, and the frames of whole videos."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.video.frame import VideoFrame
from numpy.typing import NDArray

Frames = NDArray[np.uint8]


def encode(
    path: Path,
    frames: Frames,
    *,
    times: list[int] | None = None,
    gop: int = 250,
    pix_fmt: str = "yuv444p",
    rotation: int = 0,
    container_options: dict[str, str] | None = None,
    format: str | None = None,
    codec: str = "libx264",
    options: dict[str, str] | None = None,
) -> Path:
    """A video; `times` are milliseconds of the frames, 40 ms apart by default."""
    with av.open(str(path), "w", format=format, container_options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=25, options=options or {"crf": "10", "preset": "veryfast"})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt, stream.thread_count, stream.gop_size = pix_fmt, 1, gop
        stream.codec_context.time_base = Fraction(1, 1000)
        if rotation:
            stream.set_display_rotation(rotation)
        for i, pixels in enumerate(frames):
            frame = VideoFrame.from_ndarray(pixels, format="rgb24")
            frame = frame.reformat(format=pix_fmt, threads=1)
            frame.pts, frame.time_base = times[i] if times else 40 * i, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def decode_all(path: Path) -> Frames:
    """All frames with square pixels, not turned."""
    return decode_with_times(path)[0]


def decode_with_times(path: Path) -> tuple[Frames, list[float]]:
    """All frames with square pixels, not turned, and their times in seconds from the first one."""
    with av.open(str(path)) as container:
        aspect_ratio = container.streams.video[0].sample_aspect_ratio or 1
        frames = list(container.decode(video=0))
    is_untagged_hd = frames[0].colorspace == 2 and frames[0].height >= 720
    settings = {"width": round(frames[0].width * aspect_ratio), "src_colorspace": "ITU709" if is_untagged_hd else None}
    times_s = [float(((frame.pts or 0) - (frames[0].pts or 0)) * (frame.time_base or 0)) for frame in frames]
    return np.stack([frame.to_ndarray(format="rgb24", threads=1, **settings) for frame in frames]), times_s


def list_times(path: Path) -> list[float]:
    """Times of all frames in seconds from the first one, without decoding."""
    with av.open(str(path)) as container:
        ticks = sorted(packet.pts for packet in container.demux(video=0) if packet.size)
        return [float((moment - ticks[0]) * container.streams.video[0].time_base) for moment in ticks]


def on_screen(times_s: list[float], moments_s: list[float]) -> list[int]:
    """The frame on screen at each moment: the last that is not later."""
    return [max(i for i, time_s in enumerate(times_s) if i == 0 or time_s <= moment_s + 1e-6) for moment_s in moments_s]


def count_forced(path: Path, indices: list[int]) -> int:
    """Frames that have to be decoded for the ones wanted: from each one's key frame on, in the order of decoding."""
    with av.open(str(path)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    position = {pts: i for i, pts in enumerate(packet.pts for packet in packets)}
    shown = sorted(position)
    forced: set[int] = set()
    for index in indices:
        end = position[shown[index]]
        forced.update(range(max(i for i in range(end + 1) if packets[i].is_keyframe), end + 1))
    return len(forced)
