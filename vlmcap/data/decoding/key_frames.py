"""Key frames and picture changes of a stream, which some samplings need before frames are sampled.

Times are ticks of the stream's time base unless a name ends in `_s`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import cast

import numpy as np
from av.container import InputContainer
from av.packet import Packet
from av.video.stream import VideoStream
from numpy.typing import NDArray

from vlmcap.data.decoding.container import check_deadline
from vlmcap.data.decoding.sampling import spread
from vlmcap.data.decoding.timeline import Timeline

_THUMBNAIL = 32  # pixels per side: enough to see changes, too few to see noise
_KEYS_FOR_CHANGE = 2  # times num_frames: with this many key frames, they alone show where the picture changes
_MAX_KEYS = 8  # times num_frames: largest number of key frames decoded
_MAX_THUMBNAILS = 32  # times num_frames: largest number of pictures compared


def key_frame_times(
    container: InputContainer, stream: VideoStream, timeline: Timeline, num_frames: int, deadline_s: float
) -> list[int]:
    """Returns the timestamps of at most `num_frames` key frames, evenly thinned, ascending.

    A file with a table of its frames is read at those key frames only; other files have been scanned already.

    Raises:
        VideoError: The deadline has passed.
    """
    if not timeline.is_indexed:
        times = [key.time for key in timeline.keys]
        return [times[i] for i in spread(len(times), min(len(times), num_frames))]
    if entries := _indexed_keys(stream):
        chosen = [entries[i] for i in spread(len(entries), min(len(entries), num_frames))]
        packets = _indexed_packets(container, stream, chosen, deadline_s)
        return sorted({packet.pts for packet in packets if packet.pts is not None})
    return []


def picture_changes(
    container: InputContainer, stream: VideoStream, timeline: Timeline, num_frames: int, deadline_s: float
) -> tuple[list[int], list[float]]:
    """Returns ascending timestamps, and the mean absolute difference between the pictures at neighbouring ones.

    Pictures are compared at 32 x 32 grey pixels. They are the key frames if there are many, at most 8 · `num_frames` of
    them; otherwise all reference frames are decoded, and at most 32 · `num_frames` of them compared.

    Args:
        container: Container that was just opened.
        stream: Its video stream.
        timeline: Display times of its frames.
        num_frames: Number of frames that will be sampled.
        deadline_s: `time.monotonic()` at which a `VideoError` is raised.
    """
    entries = _indexed_keys(stream) if timeline.is_indexed else []
    # Enough key frames: they alone are decoded, each by itself.
    if len(entries) >= _KEYS_FOR_CHANGE * num_frames:
        chosen = [entries[i] for i in spread(len(entries), min(len(entries), _MAX_KEYS * num_frames))]
        packets = _with_flushes(_indexed_packets(container, stream, chosen, deadline_s))
    else:
        packets = _reference_packets(container, stream, timeline, deadline_s)
    times: list[int] = []
    changes: list[float] = []
    last: NDArray[np.int16] | None = None
    for moment, frame in timeline.clock(packets):
        # Thumbnails closer to each other than this would not change the choice.
        if times and moment < times[-1] + max(1, timeline.duration // (_MAX_THUMBNAILS * num_frames)):
            continue
        grey = frame.to_ndarray(
            format="gray", width=_THUMBNAIL, height=_THUMBNAIL, interpolation="AREA", threads=1
        ).astype(np.int16)
        if last is not None:
            changes.append(float(np.abs(grey - last).mean()))
        times.append(moment)
        last = grey
    return times, changes


def _indexed_keys(stream: VideoStream) -> list[int]:
    """Returns the index timestamps of the key frames."""
    return [entry.timestamp for entry in stream.index_entries if entry.is_keyframe]


def _indexed_packets(
    container: InputContainer, stream: VideoStream, entries: list[int], deadline_s: float
) -> Iterator[Packet[VideoStream]]:
    """Yields the packets at index timestamps, which are decoding times; some formats seek by display times instead."""
    delay = max(0, (stream.start_time or 0) - stream.index_entries[0].timestamp)
    for entry in entries:
        check_deadline(deadline_s)
        for goal in (entry + delay, entry):
            container.seek(goal, stream=stream)
            packet = next(container.demux(stream), None)
            if packet is not None and packet.dts == entry:
                yield packet
                break


def _with_flushes(packets: Iterable[Packet[VideoStream]]) -> Iterator[Packet[VideoStream]]:
    """Yields each packet followed by a flush, so that the decoder returns frames that it holds for reordering."""
    for packet in packets:
        yield packet
        flush = cast("Packet[VideoStream]", Packet())
        flush.stream = packet.stream
        yield flush


def _reference_packets(
    container: InputContainer, stream: VideoStream, timeline: Timeline, deadline_s: float
) -> Iterator[Packet[VideoStream]]:
    """Yields all packets; non-reference frames are not decoded, unless frames have to be counted."""
    if timeline.is_timed:
        stream.codec_context.skip_frame = "NONREF"
    for packet in container.demux(stream):
        check_deadline(deadline_s)
        yield packet
