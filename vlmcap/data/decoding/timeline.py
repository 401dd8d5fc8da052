"""Display times of a stream's frames: start and end of the picture, and the frames at which decoding can start.

Headers state other durations than that of the picture: the end of a longer sound, the time until which a late picture
lasts, the slots of dropped frames. Only the sample table of an MP4 is trusted; the packets of any other file are
scanned without decoding, which costs little compared to decoding them.

All times are integer ticks of the stream's time base.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import pairwise
from typing import NamedTuple

import av
import numpy as np
from av.container import InputContainer
from av.packet import Packet
from av.stream import Stream
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from vlmcap.data.decoding.container import VideoError, check_deadline

_DEFAULT_FPS = 25  # for the spacing of frames without timestamps or rate
_SLOTTED = ("avi", "asf")  # formats without display times
_WITH_LENGTH = ("avi", "mxf")  # formats whose header states the duration of the picture itself
_LARGEST_JUMP_S = 1  # a larger step back means that the clock was reset, as in joined recordings


class KeyPacket(NamedTuple):
    """A packet at which decoding can start; time and size identify it."""

    time: int
    size: int
    decoding_time: int


@dataclass(frozen=True)
class Timeline:
    """Display times of a stream's picture.

    Attributes:
        start: Time at which the first frame appears.
        duration: Duration of the picture.
        step: Duration of a frame that states none.
        tick_s: Seconds per tick.
        keys: Key packets in the order of time; empty if the file's own index is used instead.
        is_indexed: Whether the file has a table of its frames (as MP4 and MOV), so that it need not be scanned.
        is_timed: Whether frames carry display times. Otherwise they are shown in the order in which they leave the
            decoder, at `slots`, and can only be identified by counting from the start.
        slots: Ascending times of all frames if the frames do not carry them.
        is_start_known: False if only decoding shows which frame is the first.
        stated_end: Time until which the picture lasts by the header, if stated.
    """

    start: int
    duration: int
    step: int
    tick_s: Fraction
    keys: tuple[KeyPacket, ...] = ()
    is_indexed: bool = False
    is_timed: bool = True
    slots: tuple[int, ...] = field(default=(), repr=False)
    is_start_known: bool = True
    stated_end: int | None = None

    @property
    def end(self) -> int:
        """Time at which the last frame leaves the screen."""
        return self.start + self.duration

    def clock(self, packets: Iterable[Packet[VideoStream]]) -> Iterator[tuple[int, VideoFrame]]:
        """Yields (time, frame) in display order; untimed packets must be all packets from the start on."""
        following, num_frames = self.start, 0
        for packet in packets:
            for frame in packet.decode():
                if self.is_timed:
                    time = following if frame.pts is None else frame.pts
                else:
                    time = self.slots[num_frames] if num_frames < len(self.slots) else following
                following, num_frames = time + self.step, num_frames + 1
                yield time, frame


def frame_rate(stream: VideoStream) -> Fraction:
    """Returns the average number of frames per second; a guess if the file does not state it."""
    return stream.average_rate or stream.guessed_rate or Fraction(_DEFAULT_FPS)


def has_sample_table(container: InputContainer, stream: VideoStream) -> bool:
    """Returns whether the index contains every frame, with reliable times; other formats fill it while being read."""
    return (
        container.format.name.startswith("mov,")
        and 0 < stream.frames <= len(stream.index_entries)
        and bool(stream.duration)
    )


def indexed_timeline(stream: VideoStream) -> Timeline:
    """Returns the timeline of a file with a sample table."""
    tick_s, step = _ticks(stream)
    duration = max(step, stream.duration or 0)
    return Timeline(stream.start_time or 0, duration, step, tick_s, is_indexed=True)


def scanned_timeline(container: InputContainer, stream: VideoStream, deadline_s: float) -> Timeline:
    """Builds the timeline of any other file from all its packets.

    Args:
        container: Container that was just opened; it is read to its end.
        stream: Its video stream.
        deadline_s: `time.monotonic()` at which a `VideoError` is raised.

    Raises:
        VideoError: The deadline has passed, or the file ends well before it should.
    """
    tick_s, step = _ticks(stream)
    # 1. Read the times of all packets; other streams only show how long the file lasts.
    scan = _Scan(step)
    last_s = 0.0
    for packet in container.demux():
        check_deadline(deadline_s)
        if packet.pts is not None:
            last_s = max(last_s, float((packet.pts + (packet.duration or 0)) * packet.time_base))
        if packet.stream_index == stream.index and packet.size and not packet.is_discard:
            scan.add(packet)
    stated_end = _stated_end(container, stream, tick_s)
    if stated_end is None and container.format.name == "matroska,webm" and container.duration:
        stated_s = container.duration / av.time_base  # the end of the longest stream
        check_missing(stated_s - last_s, stated_s)
    if not scan.times:
        return Timeline(stream.start_time or 0, step, step, tick_s, stated_end=stated_end)
    # 2. Without display times, frames are shown at slots, in the order in which they leave the decoder.
    scan.drop_before_first_key()
    is_reordered, is_slotted = bool(stream.codec_context.has_b_frames), container.format.name in _SLOTTED
    if slots := scan.slots(is_reordered, is_slotted, int(_LARGEST_JUMP_S / tick_s)):
        keys = tuple(KeyPacket(slots[i], scan.sizes[i], slots[i]) for i in scan.keys)
        duration = slots[-1] - slots[0] + _shortest(slots, step)
        return Timeline(
            slots[0], duration, step, tick_s, keys, is_timed=False, slots=tuple(slots), stated_end=stated_end
        )
    # 3. Otherwise each frame is shown at its own time.
    times = [time for time in scan.times if time is not None]
    keys = tuple(
        sorted(KeyPacket(time, scan.sizes[i], scan.order(i)) for i in scan.keys if (time := scan.times[i]) is not None)
    )
    # The first packet shows the first frame, unless frames are reordered or key frames are missing.
    start, is_start_known = times[0], times[0] == min(times) and scan.is_from_key
    if is_slotted:
        start = scan.first_time()
    return Timeline(
        start, max(step, scan.end - start), step, tick_s, keys, is_start_known=is_start_known, stated_end=stated_end
    )


class _Scan:
    """The packets of a stream in decoding order."""

    def __init__(self, step: int) -> None:
        self.times: list[int | None] = []
        self.decoding_times: list[int | None] = []
        self.sizes: list[int] = []
        self.keys: list[int] = []
        self._last: tuple[int, int] | None = None
        self.is_from_key = True
        self._step = step

    def add(self, packet: Packet[Stream]) -> None:
        if packet.is_keyframe:
            self.keys.append(len(self.times))
        if packet.pts is not None and (self._last is None or packet.pts >= self._last[0]):
            self._last = (packet.pts, packet.duration or 0)
        self.times.append(packet.pts)
        self.decoding_times.append(packet.dts)
        self.sizes.append(packet.size)

    @property
    def end(self) -> int:
        """Time at which the last frame leaves the screen, by its own duration or that of the shortest frame."""
        assert self._last is not None
        times = sorted({time for time in self.times if time is not None})
        return self._last[0] + max(self._last[1] or self._step, _shortest(times, self._step))

    def drop_before_first_key(self) -> None:
        """Drops packets before the first key frame, as in a truncated stream; most formats cannot decode them."""
        first = self.keys[0] if self.keys else 0
        if first == 0:
            return
        self.is_from_key = False
        self.keys = [i - first for i in self.keys]
        del self.times[:first], self.decoding_times[:first], self.sizes[:first]

    def order(self, i: int) -> int:
        """Returns the time by which packet `i` is found in the file."""
        decoding_time, time = self.decoding_times[i], self.times[i]
        return next((value for value in (decoding_time, time) if value is not None), 0)

    def slots(self, is_reordered: bool, is_slotted: bool, largest_jump: int) -> list[int]:
        """Returns ascending times of all frames if packets do not carry display times; empty if they do."""
        times = [time for time in self.times if time is not None]
        start = times[0] if times else 0
        # Times at a constant rate, where nothing better is known.
        even = [start + self._step * i for i in range(len(self.times))]
        # One of two packets may lack a time, as they can be the fields of one frame.
        if 2 * len(times) < len(even):
            return self._between_known() or even
        orders = [self.order(i) for i, time in enumerate(self.times) if time is not None]
        # The clock was reset, so no time can be trusted.
        if any(after < before - largest_jump for before, after in pairwise(orders)):
            return even
        if any(after <= before for before, after in pairwise(times)) or len(times) < 2:
            return []
        if is_reordered:  # unordered packets: either they come in display order, or their order is unknown
            return [self.first_time() if is_slotted else start, *times[1:]] if len(times) == len(even) else even
        # AVI has no display times. For H.264 they are invented: each frame gets the decoding time of the next one.
        is_made_up = is_slotted and times[:-1] == orders[1:]
        is_even = all(time - order == self._step for time, order in zip(times[1:], orders[1:], strict=True))
        return [orders[1] - self._step, *orders[1:]] if is_made_up and not is_even else []

    def _between_known(self) -> list[int]:
        """Interpolates between the few packets that have a time; empty if these are too few or out of order."""
        known = [i for i in range(len(self.times)) if self.times[i] is not None or self.decoding_times[i] is not None]
        orders = [self.order(i) for i in known]
        if len(known) < 2 or any(after <= before for before, after in pairwise(orders)):
            return []
        known.append(len(self.times))
        # One more place behind the last frame, at the average distance.
        orders.append(orders[-1] + round((orders[-1] - orders[0]) / (known[-2] - known[0]) * (known[-1] - known[-2])))
        spread = np.interp(np.arange(len(self.times)), known, orders)
        first = self.times[known[0]]
        start = orders[0] if first is None else first
        return [start + round(float(time - spread[0])) for time in spread]

    def first_time(self) -> int:
        """Returns the time of the first frame of an AVI; in MPEG-1 it is too early by the frames the decoder holds."""
        first, *others = sorted(time for time in self.times if time is not None)
        return max(first, others[0] - (self.order(1) - self.order(0))) if others else first


def _shortest(times: list[int], default: int) -> int:
    """Returns the smallest difference between neighbouring ascending times, at least 1."""
    return max(1, min((after - before for before, after in pairwise(times)), default=default))


def check_missing(missing_s: float, whole_s: float) -> None:
    """Raises `VideoError` if more than a tenth and a second of `whole_s` are missing."""
    if missing_s > max(1.0, 0.1 * whole_s):
        raise VideoError(f"it is truncated: {missing_s:.1f} of {whole_s:.1f} seconds are missing")


def _ticks(stream: VideoStream) -> tuple[Fraction, int]:
    """Returns seconds per tick, and the ticks from frame to frame."""
    rate = frame_rate(stream)
    tick_s = stream.time_base or 1 / rate
    return tick_s, max(1, round(1 / (rate * tick_s)))


def _stated_end(container: InputContainer, stream: VideoStream, tick_s: Fraction) -> int | None:
    # "00:01:02.345000000"
    if tag := re.fullmatch(r"(\d+):(\d+):(\d+(?:\.\d+)?)", stream.metadata.get("DURATION", "")):
        # Matroska; some writers state the duration, which is never later than the end.
        hours, minutes, seconds = (Fraction(number) for number in tag.groups())
        return round((hours * 3600 + minutes * 60 + seconds) / tick_s)
    if stream.duration and container.format.name in _WITH_LENGTH:
        return (stream.start_time or 0) + stream.duration
    return None
