"""What a stream tells about its content before its frames are sampled: where its key frames are and where its picture changes.

Times are ticks of the stream's time base unless a name ends in `_s`.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from av.container import InputContainer
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from numpy.typing import NDArray

from vlmcap.data.decoding.container import check_deadline
from vlmcap.data.decoding.sampling import spread

_THUMBNAIL = 32  # pixels a side: enough to see change, and too few to see noise
_KEYS_FOR_CHANGE = 2  # times num_frames: with so many key frames, they alone tell where the picture changes
_MOST_KEYS = 8  # times num_frames: key frames that are decoded at most
_MOST_THUMBNAILS = 32  # times num_frames: pictures compared at most


def key_frame_times(container: InputContainer, stream: VideoStream, num_frames: int, deadline_s: float) -> list[int]:
    """Timestamps of at most `num_frames` key frames, evenly thinned, ascending.

    A file with a whole index is read at those key frames only; any other is read through, without decoding.

    Raises:
        VideoError: The deadline has passed.
    """
    if entries := _indexed_keys(stream):
        packets = _indexed_packets(container, stream, [entries[i] for i in spread(len(entries), min(len(entries), num_frames))], deadline_s)
        return sorted({packet.pts for packet in packets if packet.pts is not None})
    times = []
    for packet in container.demux(stream):
        check_deadline(deadline_s)
        if packet.is_keyframe and packet.pts is not None:
            times.append(packet.pts)
    times.sort()
    return [times[i] for i in spread(len(times), min(len(times), num_frames))]


def picture_changes(
    container: InputContainer, stream: VideoStream, num_frames: int, span: int, deadline_s: float
) -> tuple[list[int], list[float]]:
    """Ascending timestamps, and the mean absolute difference of the pictures between each two of them, at 32 x 32 grey pixels.

    The pictures are the key frames where these are many, at most 8 · `num_frames` of them; else what other frames lean on is decoded
    once, and at most 32 · `num_frames` of it compared.

    Args:
        container: Just opened.
        stream: Its video stream.
        num_frames: As many as will be sampled.
        span: Length of the clip.
        deadline_s: `time.monotonic()` at which a `VideoError` says that it took too long.
    """
    entries = _indexed_keys(stream)
    if len(entries) >= _KEYS_FOR_CHANGE * num_frames:
        chosen = [entries[i] for i in spread(len(entries), min(len(entries), _MOST_KEYS * num_frames))]
        frames = _indexed_frames(container, stream, chosen, deadline_s)
    else:
        frames = _reference_frames(container, stream, deadline_s)
    times: list[int] = []
    changes: list[float] = []
    last: NDArray[np.int16] | None = None
    for frame in frames:
        if frame.pts is None or (times and frame.pts < times[-1] + max(1, span // (_MOST_THUMBNAILS * num_frames))):
            continue
        grey = frame.to_ndarray(format="gray", width=_THUMBNAIL, height=_THUMBNAIL, interpolation="AREA", threads=1).astype(np.int16)
        if last is not None:
            changes.append(float(np.abs(grey - last).mean()))
        times.append(frame.pts)
        last = grey
    return times, changes


def has_whole_index(stream: VideoStream) -> bool:
    """Whether the index is known to hold every frame; some formats have none or fill it while they are read."""
    return 0 < stream.frames <= len(stream.index_entries)


def _indexed_keys(stream: VideoStream) -> list[int]:
    """Index timestamps of the key frames; none without a whole index."""
    return [entry.timestamp for entry in stream.index_entries if entry.is_keyframe] if has_whole_index(stream) else []


def _indexed_packets(
    container: InputContainer, stream: VideoStream, entries: list[int], deadline_s: float
) -> Iterator[Packet[VideoStream]]:
    """The packets at index timestamps, which are times of decoding; seeking wants those of display in some formats."""
    delay = max(0, (stream.start_time or 0) - stream.index_entries[0].timestamp)
    for entry in entries:
        check_deadline(deadline_s)
        for goal in (entry + delay, entry):
            container.seek(goal, stream=stream)
            packet = next(container.demux(stream), None)
            if packet is not None and packet.dts == entry:
                yield packet
                break


def _indexed_frames(container: InputContainer, stream: VideoStream, entries: list[int], deadline_s: float) -> Iterator[VideoFrame]:
    for packet in _indexed_packets(container, stream, entries, deadline_s):
        yield from packet.decode()
        yield from stream.decode(None)  # the decoder holds back what it could still reorder


def _reference_frames(container: InputContainer, stream: VideoStream, deadline_s: float) -> Iterator[VideoFrame]:
    stream.codec_context.skip_frame = "NONREF"
    for packet in container.demux(stream):
        check_deadline(deadline_s)
        yield from packet.decode()
