"""Frames out of video files, and small video files out of frames.

Legend: F sampled frames, T frames of a clip, H/W pixels.
"""

from __future__ import annotations

import os
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from av.video.frame import VideoFrame
from numpy.typing import NDArray
from torch import Tensor

from vlmcap.data.frame_reader import FrameReader, VideoError, check_size, open_container
from vlmcap.data.sampling import uniform_timestamps

__all__ = ["MAX_PIXELS", "VideoError", "decode_frames", "write_video"]

MAX_PIXELS = 7680 * 4320  # 8K

# Of the colour conversion. With more, each frame owns a pool of threads, and a data worker that was forked from a process with such a
# frame in its garbage hangs for ever when it frees it, since the pool's threads do not exist there.
_THREADS = 1


def decode_frames(path: str | Path, num_frames: int, *, timeout_s: float = 60.0, max_pixels: int = MAX_PIXELS) -> Tensor:
    """The frames at the centres of `num_frames` equal segments of a clip, upright, always exactly `num_frames`.

    A clip with fewer frames repeats them. Reading stops after the last wanted frame, and jumps to key frames where the file has an
    index of them.

    Args:
        path: A local video file.
        num_frames: F, at least 1.
        timeout_s: Seconds after which reading is given up; looked at between frames.
        max_pixels: Frames with more pixels are refused.

    Returns:
        uint8 (F, 3, H, W), RGB.

    Raises:
        VideoError: The file cannot be read as a video, is truncated, too large a picture, or too slow.
        ValueError: `num_frames` is below 1.
    """
    if num_frames < 1:
        raise ValueError(f"num_frames must be at least 1, not {num_frames}")
    path, deadline_s = Path(path), time.monotonic() + timeout_s
    try:
        if not path.is_file():  # a pipe would block for ever
            raise VideoError("there is no such file")
        if path.stat().st_size == 0:
            raise VideoError("the file is empty")
        with open_container(path, timeout_s) as container:
            reader = FrameReader(path, container, deadline_s, max_pixels)
            return _read(reader, num_frames, max_pixels)
    except VideoError as error:
        raise VideoError(f"{path.name} cannot be read: {error}") from error
    except (av.FFmpegError, OSError, ValueError) as error:  # ValueError: a pixel format that cannot become RGB
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise VideoError(f"{path.name} cannot be read: it is damaged, truncated or no video ({reason})") from error


def _read(reader: FrameReader, num_frames: int, max_pixels: int) -> Tensor:
    frames: Tensor | None = None
    size, last = (0, 0), None
    for row, moment_s in enumerate(uniform_timestamps(reader.duration_s, num_frames)):
        frame = reader.frame_at(moment_s)
        if frames is not None and frame is last:
            frames[row] = frames[row - 1]
            continue
        if frames is None:
            size = (frame.width, frame.height)
        check_size(frame.width, frame.height, max_pixels)
        pixels = _to_rgb(frame, *size)
        if frames is None:
            frames = torch.empty((num_frames, *pixels.shape), dtype=torch.uint8)
        frames.numpy()[row] = pixels
        last = frame
    assert frames is not None
    return frames


def _to_rgb(frame: VideoFrame, width: int, height: int) -> NDArray[np.uint8]:
    """uint8 (3, H, W), upright; scaled to the clip's first frame where the size changes on the way."""
    pixels = np.asarray(frame.to_ndarray(format="rgb24", width=width, height=height, threads=_THREADS), dtype=np.uint8)
    quarter_turns = round(frame.rotation / 90) % 4  # phones store the picture as the sensor lies and say how to turn it
    return np.rot90(pixels, quarter_turns).transpose(2, 0, 1)


def write_video(path: str | Path, frames: NDArray[np.uint8], fps: float, *, crf: int = 23, preset: str = "veryfast") -> None:
    """Write an H.264 yuv420p MP4 whole or not at all; equal frames give equal bytes.

    Args:
        path: Where to; its folder must exist.
        frames: uint8 (T, H, W, 3), RGB, T at least 1, H and W even (as yuv420p needs).
        fps: Frames a second, positive.
        crf: Quality, 0 (lossless) to 51.
        preset: Of x264: faster presets give larger files.

    Raises:
        ValueError: The frames have another shape, type or odd sides, or `fps` is not positive.
    """
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or 0 in frames.shape:
        raise ValueError(f"frames must be uint8 (T, H, W, 3), not {frames.dtype} {frames.shape}")
    if frames.shape[1] % 2 or frames.shape[2] % 2:
        raise ValueError(f"the sides of a frame must be even, not {frames.shape[2]}x{frames.shape[1]}")
    if fps <= 0:
        raise ValueError(f"fps must be positive, not {fps}")
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        _encode(temporary, frames, Fraction(fps).limit_denominator(1001), {"crf": str(crf), "preset": preset})
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _encode(path: Path, frames: NDArray[np.uint8], rate: Fraction, options: dict[str, str]) -> None:
    with av.open(f"file:{path}", "w", format="mp4", container_options={"movflags": "+faststart", "fflags": "+bitexact"}) as container:
        stream = container.add_stream("libx264", rate=rate, options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        # One thread: no start-up cost on small clips, and bytes that do not depend on the number of cores.
        stream.thread_count = 1
        for pixels in frames:
            frame = VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            container.mux(stream.encode(frame.reformat(format="yuv420p", threads=_THREADS)))
        container.mux(stream.encode(None))
