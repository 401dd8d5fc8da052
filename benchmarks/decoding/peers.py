"""Other libraries that read frames by index on one thread, as their documentation recommends.

A function raises ImportError where its library is not installed.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Frames = NDArray[np.uint8]

os.environ["OPENCV_FFMPEG_CAPTURE_OPTIONS"] = (
    "threads;1"  # as data workers run: they are as many processes as there are cores
)


def opencv_loop(path: Path, indices: list[int]) -> Frames:
    """Grabs frame after frame up to the last wanted one; only wanted ones are converted."""
    import cv2

    cv2.setNumThreads(1)
    frames, wanted = [], set(indices)
    capture = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG)
    for i in range(max(indices) + 1):
        capture.grab()
        if i in wanted:
            frames.append(cv2.cvtColor(capture.retrieve()[1], cv2.COLOR_BGR2RGB))
    capture.release()
    return np.stack(frames)


def opencv_seek(path: Path, indices: list[int]) -> Frames:
    import cv2

    cv2.setNumThreads(1)
    frames = []
    capture = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG)
    for index in indices:
        capture.set(cv2.CAP_PROP_POS_FRAMES, index)
        frames.append(cv2.cvtColor(capture.read()[1], cv2.COLOR_BGR2RGB))
    capture.release()
    return np.stack(frames)


def decord(path: Path, indices: list[int]) -> Frames:
    import decord as library

    return library.VideoReader(str(path), ctx=library.cpu(0), num_threads=1).get_batch(indices).asnumpy()


def torchcodec(path: Path, indices: list[int]) -> Frames:
    try:
        from torchcodec.decoders import VideoDecoder
    except (RuntimeError, OSError) as error:
        raise ImportError(f"it does not load: {error}") from error

    decoder = VideoDecoder(str(path), seek_mode="exact", num_ffmpeg_threads=1, dimension_order="NHWC")
    return decoder.get_frames_at(indices).data.numpy()


PEERS: dict[str, Callable[[Path, list[int]], Frames]] = {
    "OpenCV, loop": opencv_loop,
    "OpenCV, seeking": opencv_seek,
    "decord": decord,
    "torchcodec": torchcodec,
}
