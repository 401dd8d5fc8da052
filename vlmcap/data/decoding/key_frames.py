"""What a stream tells about its content before its frames are sampled.

Where its key frames are and where its picture changes.

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

_THUMBNAIL = 32  # pixels a side: enough to see change, and too few to see noise
_KEYS_FOR_CHANGE = 2  # times num_frames: with so many key frames, they alone tell where the picture changes
_MOST_KEYS = 8  # times num_frames: key frames that are decoded at most
_MOST_THUMBNAILS = 32  # times num_frames: pictures compared at most


def key_frame_times(
    container: InputContainer, stream: VideoStream, timeline: Timeline, num_frames: int, deadline_s: float
) -> list[int]:
    """Timestamps of at most `num_frames` key frames, evenly thinned, ascending.

    A file with a table of its frames is read at those key frames only; any other has been read through already.

    Raises:
        VideoError: The deadline has passed.
    """
    if not timeline.is_indexed:
        times = [key.time for key in timeline.keys]
        return [times[i] for i in spread(len(times), min(len(times), num_frames))]
    if entries := _indexed_keys(stream):
        packets = _indexed_packets(
            container, stream, [entries[i] for i in spread(len(entries), min(len(entries), num_frames))], deadline_s
        )
        return sorted({packet.pts for packet in packets if packet.pts is not None})
    return []


def picture_changes(
    container: InputContainer, stream: VideoStream, timeline: Timeline, num_frames: int, deadline_s: float
) -> tuple[list[int], list[float]]:
    """Ascending timestamps, and the mean absolute difference of the pictures between each two of them, at 32 x 32 grey pixels.

    The pictures are the key frames where these are many, at most 8 · `num_frames` of them; else what other frames lean
    on is decoded once, and at most 32 · `num_frames` of it compared.

    Args:
        container: Just opened.
        stream: Its video stream.
        timeline: When its frames are shown.
        num_frames: As many as will be sampled.
        deadline_s: `time.monotonic()` at which a `VideoError` says that it took too long.
    """
    entries = _indexed_keys(stream) if timeline.is_indexed else []
    if len(entries) >= _KEYS_FOR_CHANGE * num_frames:
        chosen = [entries[i] for i in spread(len(entries), min(len(entries), _MOST_KEYS * num_frames))]
        packets = _with_flushes(_indexed_packets(container, stream, chosen, deadline_s))
    else:
        packets = _reference_packets(container, stream, timeline, deadline_s)
    times: list[int] = []
    changes: list[float] = []
    last: NDArray[np.int16] | None = None
    for moment, frame in timeline.clock(packets):
        if times and moment < times[-1] + max(1, timeline.duration // (_MOST_THUMBNAILS * num_frames)):
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
    """Index timestamps of the key frames."""
    return [entry.timestamp for entry in stream.index_entries if entry.is_keyframe]


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


def _with_flushes(packets: Iterable[Packet[VideoStream]]) -> Iterator[Packet[VideoStream]]:
    """Each packet, and what makes the decoder give the frames that it holds back for reordering."""
    for packet in packets:
        yield packet
        flush = cast("Packet[VideoStream]", Packet())
        flush.stream = packet.stream
        yield flush


def _reference_packets(
    container: InputContainer, stream: VideoStream, timeline: Timeline, deadline_s: float
) -> Iterator[Packet[VideoStream]]:
    """All packets; frames that no other leans on are skipped, unless frames have to be counted."""
    if timeline.is_timed:
        stream.codec_context.skip_frame = "NONREF"
    for packet in container.demux(stream):
        check_deadline(deadline_s)
        yield packet
