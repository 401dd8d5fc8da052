"""Reading of frames from video files, and writing of small video files.

Modules that need PyAV are imported when a video is read or written, so that images do not need it.

Legend: F sampled frames, T frames of a clip, H/W pixels.
"""

from __future__ import annotations

import time
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.random import Generator
from numpy.typing import NDArray
from torch import Tensor

from vlmcap.config import DataConfig, Decoder
from vlmcap.data.decoding.container import DecodeLimits, MediaFile, VideoError, check_size, video_errors
from vlmcap.data.decoding.images import is_image, read_image, read_image_list
from vlmcap.data.decoding.sampling import spread
from vlmcap.data.decoding.torchcodec_reader import TorchcodecReader, resolve_decoder
from vlmcap.data.media import local_path
from vlmcap.files import replacing
from vlmcap.types import Clip

if TYPE_CHECKING:
    from vlmcap.data.decoding.frame_reader import FrameReader

__all__ = [
    "DecodeLimits",
    "DecodedFrames",
    "VideoError",
    "decode_frames",
    "pad_frames",
    "read_frames",
    "read_timed_frames",
    "write_video",
]

_THREADS = 1  # for the colour conversion, as in `display`


class DecodedFrames(NamedTuple):
    """Frames of a clip and their display times.

    Attributes:
        frames: uint8 (F', 3, H, W), RGB.
        times_s: float64 (F',), seconds from the clip's first frame; None for images, which have no clock.
    """

    frames: Tensor
    times_s: Tensor | None


def read_frames(
    clip: Clip | str, data: DataConfig, *, rng: Generator | None = None, limits: DecodeLimits | None = None
) -> Tensor:
    """Reads frames of a video, an image or a list of images, upright, in the order of time.

    There are fewer than `data.num_frames` for images, for clips that have fewer frames, and for `fps` in short clips;
    `pad_frames` repeats frames of such clips. Reading stops after the last wanted frame, and jumps to key frames if the
    file has an index of them.

    Args:
        clip: Clip, or address of a video or image.
        data: Data configuration: sampling, time limit and decoder. torchcodec reads MP4 and MOV files that need at most
            a rotation for display; PyAV reads the others.
        rng: Random number generator; without one, random sampling is uniform and nothing is jittered.
        limits: Further limits on the clip; `DecodeLimits()` by default.

    Returns:
        uint8 (F', 3, H, W), RGB, 1 <= F' <= `data.num_frames`.

    Raises:
        VideoError: The file cannot be read, is truncated, its picture is too large, it is too long, or takes too much
            time.
    """
    return read_timed_frames(clip, data, rng=rng, limits=limits).frames


def read_timed_frames(
    clip: Clip | str, data: DataConfig, *, rng: Generator | None = None, limits: DecodeLimits | None = None
) -> DecodedFrames:
    """Reads frames as `read_frames` does, with the time of each; `pad_frames` repeats times like frames."""
    limits = limits or DecodeLimits()
    # One deadline for opening, scanning and decoding.
    deadline_s = time.monotonic() + data.decode_timeout_s
    file = MediaFile(clip if isinstance(clip, str) else clip.video)
    if isinstance(clip, Clip) and clip.frames:
        return DecodedFrames(read_image_list(clip.frames, data, rng, limits, deadline_s), None)
    with video_errors(file.name), file.open_bytes() as stream:
        if is_image(stream):
            return DecodedFrames(read_image(stream, data, rng, limits, deadline_s), None)
        from vlmcap.data.decoding.frame_reader import FrameReader

        with file.open_container(data.decode_timeout_s, stream) as container:
            reader = FrameReader(file, container, deadline_s, limits)
            moments = reader.choose_moments(data, rng)
            # torchcodec seeks to wrong frames in other files, and ignores mirroring, interlacing, pixel aspect and HDR.
            if resolve_decoder(data.decoder) is Decoder.pyav or not (reader.timeline.is_indexed and reader.is_plain):
                return _without_repeats(*_read(reader, moments, limits.max_pixels))
        path = local_path(file.address)
        stream.seek(0)
        other = TorchcodecReader(stream if path is None else str(path), limits.max_pixels)
        start_s = reader.stream_time_s(0.0)
        reader.check_end(other.end_s - start_s)
        frames, times_s, indices = other.frames_at([reader.stream_time_s(moment_s) for moment_s in moments])
        return _without_repeats(frames, (times_s - start_s).clamp(min=0.0), indices)


def decode_frames(path: str | Path, num_frames: int, *, limits: DecodeLimits | None = None) -> Tensor:
    """Reads the frames at the centres of `num_frames` equal segments of a clip, upright, always exactly `num_frames`.

    A clip with fewer frames repeats them.

    Returns:
        uint8 (F, 3, H, W), RGB.

    Raises:
        VideoError: The file cannot be read, as for `read_frames`.
        ValueError: `num_frames` is below 1.
    """
    return pad_frames(read_frames(str(path), DataConfig(num_frames=num_frames), limits=limits), num_frames)


def pad_frames(frames: Tensor, num_frames: int) -> Tensor:
    """Repeats frames, as evenly as possible and in the order of time, until there are `num_frames`.

    Args:
        frames: (F', ...), F' at least 1.
        num_frames: F, at least F'.
    """
    if len(frames) == num_frames:
        return frames
    return frames[spread(len(frames), num_frames)]


def _read(reader: FrameReader, moments: list[float], max_pixels: int) -> tuple[Tensor, Tensor, list[int]]:
    """Returns the distinct frames on screen at the moments, their times, and the index of the frame at each moment."""
    from vlmcap.data.decoding.display import square_size, to_rgb

    frames: Tensor | None = None
    size, last, indices = (0, 0), None, []
    times_s: list[float] = []
    for moment_s in moments:
        frame = reader.frame_at(moment_s)
        # The same frame is on screen, and is not converted twice.
        if frames is not None and frame is last:
            indices.append(indices[-1])
            continue
        check_size(frame.width, frame.height, max_pixels)
        if frames is None:  # if the size changes, later frames are scaled to that of the first one
            size = square_size(frame, reader.aspect_ratio)
            check_size(*size, max_pixels)
        pixels = to_rgb(frame, *size)
        if frames is None:
            frames = torch.empty((len(moments), *pixels.shape), dtype=torch.uint8)
        indices.append(len(times_s))
        times_s.append(reader.shown_s)
        frames.numpy()[indices[-1]] = pixels
        last = frame
    assert frames is not None
    num_shown = len(times_s)
    # A view would carry the unused frames to other processes.
    shown = frames if num_shown == len(indices) else frames[:num_shown].clone()
    return shown, torch.tensor(times_s, dtype=torch.float64), indices


def _without_repeats(frames: Tensor, times_s: Tensor, indices: list[int]) -> DecodedFrames:
    """Selects the frame of each moment; only the distinct frames if `pad_frames` repeats them in the same way."""
    if indices == spread(len(frames), len(indices)):
        return DecodedFrames(frames, times_s)
    return DecodedFrames(frames[indices], times_s[indices])


# x264's assembly of the macroblock tree rounds differently between CPUs, and reads uninitialized memory if frames are
# small: 60 encodings of the same frames gave 23 different files. This option uses the plain C code instead.
_REPRODUCIBLE = "cpu-independent=1"


def write_video(path: str | Path, frames: NDArray[np.uint8], fps: float, *, crf: int = 23) -> None:
    """Writes an H.264 yuv420p MP4 completely or not at all; equal frames give equal bytes.

    Args:
        path: Output file; its folder must exist.
        frames: uint8 (T, H, W, 3), RGB, T at least 1, H and W even (as yuv420p requires).
        fps: Positive number of frames per second.
        crf: Quality, 0 (lossless) to 51.

    Raises:
        ValueError: The frames have another shape or type or odd sides, or `fps` is not positive.
    """
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or 0 in frames.shape:
        raise ValueError(f"frames must be uint8 (T, H, W, 3), not {frames.dtype} {frames.shape}")
    if frames.shape[1] % 2 or frames.shape[2] % 2:
        raise ValueError(f"the sides of a frame must be even, not {frames.shape[2]}x{frames.shape[1]}")
    if fps <= 0:
        raise ValueError(f"fps must be positive, not {fps}")
    options = {"crf": str(crf), "preset": "veryfast", "x264-params": _REPRODUCIBLE}
    with replacing(Path(path)) as partial:
        # 1001 allows 30000/1001, the rate of NTSC.
        _encode(partial, frames, Fraction(fps).limit_denominator(1001), options)


def _encode(path: Path, frames: NDArray[np.uint8], rate: Fraction, options: dict[str, str]) -> None:
    import av
    from av.video.frame import VideoFrame
    from av.video.reformatter import Colorspace

    from vlmcap.data.decoding.display import is_hd

    with av.open(
        # The index at the front lets a reader start before the whole file is there; bitexact leaves out version and
        # date.
        f"file:{path}",
        "w",
        format="mp4",
        container_options={"movflags": "+faststart", "fflags": "+bitexact"},
    ) as container:
        stream = container.add_stream("libx264", rate=rate, options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        # One thread: fast start on small clips, and bytes that do not depend on the number of cores.
        stream.thread_count = 1
        colorspace = Colorspace.ITU709 if is_hd(stream.width, stream.height) else Colorspace.ITU601
        for pixels in frames:
            frame = VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            yuv = frame.reformat(format="yuv420p", dst_colorspace=colorspace, threads=_THREADS)
            container.mux(stream.encode(yuv))
        container.mux(stream.encode(None))
