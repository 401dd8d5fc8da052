"""Reading of frames at given moments of an open video, decoding as little as possible.

All times are integer ticks of the stream's time base unless a name ends in `_s`. The frame *at* a moment is the one on
screen then: the last whose timestamp is not later. This also holds for a variable frame rate.
"""

from __future__ import annotations

import bisect
import math
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from fractions import Fraction
from itertools import chain

import av
from av.container import InputContainer
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from numpy.random import Generator

from vlmcap.config import DataConfig, Sampling
from vlmcap.data.decoding.container import DecodeLimits, MediaFile, VideoError, check_deadline, find_video_stream
from vlmcap.data.decoding.display import is_plain
from vlmcap.data.decoding.key_frames import key_frame_times, picture_changes
from vlmcap.data.decoding.sampling import adaptive_moments, choose_moments, jitter_moments, keyframe_moments
from vlmcap.data.decoding.timeline import (
    KeyPacket,
    check_missing,
    frame_rate,
    has_sample_table,
    indexed_timeline,
    scanned_timeline,
)

_MIN_SEEK_FRAMES = 4  # for less, decoding on is cheaper than refilling the decoder after a seek
_SKIP_MARGIN_FRAMES = 4  # earlier than this before a wanted moment, non-reference frames are not decoded
_KEYS_BACK = (1, 2, 5)  # key frames before a moment from which decoding is tried: some lack part of the picture
_BEFORE_ALL = -(1 << 63)  # earlier than any frame


class FrameReader:
    """Reads the frames of one clip at ascending moments.

    Attributes:
        timeline: Display times of the clip's frames.
        num_packets: Number of packets given to the decoder so far, some of which it drops without decoding.

    Args:
        file: File of `container`; it is opened again to scan all its packets if it has no table of its frames.
        container: Container that was just opened.
        deadline_s: `time.monotonic()` at which reading stops with a `VideoError`.
        limits: Further limits on the clip.
    """

    def __init__(self, file: MediaFile, container: InputContainer, deadline_s: float, limits: DecodeLimits) -> None:
        self._file, self._container, self._deadline_s, self._limits = file, container, deadline_s, limits
        self._stream = find_video_stream(container, limits.max_pixels)
        if has_sample_table(container, self._stream):
            self.timeline = indexed_timeline(self._stream)
        else:
            with self._reopened() as (other, stream):
                self.timeline = scanned_timeline(other, stream, deadline_s)
        if self.duration_s > limits.max_duration_s:
            raise VideoError(
                f"its header states {self.duration_s:.0f} seconds, more than the allowed {limits.max_duration_s:.0f}"
            )
        self._shown: tuple[int, VideoFrame] | None = None  # time and frame that is on screen
        self._ahead: tuple[int, VideoFrame] | None = None  # the next one, which ends the time of `_shown`
        self._is_started, self._can_seek = False, self.timeline.is_timed
        # Only H.264 marks such frames on all layers, and a mistake can only be corrected by seeking back.
        self._can_skip = self.codec == "h264" and self.timeline.is_indexed
        self._decode_all_from, self._is_skipping, self._last_skipped = _BEFORE_ALL, False, _BEFORE_ALL
        self.num_packets = 0
        first = self.timeline.start - self.timeline.step if self.timeline.is_indexed else _BEFORE_ALL
        self._frames = self._decode(container.demux(self._stream), first)
        if not self.timeline.is_start_known:
            start = self._first_time()
            self.timeline = replace(
                self.timeline, start=start, duration=max(self.timeline.step, self.timeline.end - start)
            )
        if self.timeline.stated_end is not None and not self.timeline.is_indexed:
            stated_s = float(self.timeline.stated_end * self.timeline.tick_s)
            check_missing(stated_s - float(self.timeline.end * self.timeline.tick_s), stated_s)

    @property
    def duration_s(self) -> float:
        """Duration of the picture in seconds; that of one frame if nothing else is known."""
        return float(self.timeline.duration * self.timeline.tick_s)

    @property
    def fps(self) -> float:
        """Average number of frames per second."""
        return float(frame_rate(self._stream))

    @property
    def num_frames(self) -> int:
        """Number of frames from the header, or estimated by the frame rate."""
        return self._stream.frames or max(1, round(self.duration_s * self.fps))

    @property
    def codec(self) -> str:
        """Name of the codec."""
        return self._stream.codec_context.name

    @property
    def aspect_ratio(self) -> float:
        """Width of a pixel over its height."""
        ratio = self._stream.sample_aspect_ratio
        return float(ratio) if ratio is not None and ratio > 0 else 1.0

    @property
    def is_plain(self) -> bool:
        """Whether the first frame needs at most a rotation for display; it is decoded if no frame has been."""
        if self._shown is None:
            self._go_to(_BEFORE_ALL)
        return self._shown is not None and is_plain(self._shown[1], self.aspect_ratio)

    @property
    def shown_s(self) -> float:
        """Seconds from the first frame of the clip to the one that `frame_at` returned last."""
        assert self._shown is not None
        return float(max(0, self._shown[0] - self.timeline.start) * self.timeline.tick_s)

    def choose_moments(self, data: DataConfig, rng: Generator | None) -> list[float]:
        """Returns the moments that `data.sampling` selects, ascending, in seconds from the start of the clip.

        Raises:
            VideoError: The deadline has passed.
        """
        if data.sampling is Sampling.keyframe:
            with self._reopened() as (container, stream):
                times = key_frame_times(container, stream, self.timeline, data.num_frames, self._deadline_s)
            moments = keyframe_moments(self._in_seconds(times), self.duration_s, data.num_frames)
        elif data.sampling is Sampling.adaptive:
            with self._reopened() as (container, stream):
                times, changes = picture_changes(container, stream, self.timeline, data.num_frames, self._deadline_s)
            moments = adaptive_moments(self._in_seconds(times), changes, self.duration_s, data.num_frames)
        else:
            return choose_moments(data, self.duration_s, rng)
        return jitter_moments(moments, data, self.duration_s, rng)

    def stream_time_s(self, moment_s: float) -> float:
        """Returns a moment in the stream's time, in the middle of the tick that decides which frame is on screen."""
        return float((self._tick_of(moment_s) + Fraction(1, 2)) * self.timeline.tick_s)

    def frame_at(self, moment_s: float) -> VideoFrame:
        """Returns the frame on screen `moment_s` seconds after the start of the clip; moments must not descend.

        Raises:
            VideoError: The clip ends well before it should, contains no frame, or the deadline has passed.
        """
        moment = self._tick_of(moment_s)
        # 1. Jump ahead if that skips enough frames.
        if self._can_seek and self._saves_decoding(moment):
            self._seek(moment)
        # 2. Let the decoder drop non-reference frames until shortly before the moment.
        if self._can_skip:
            self._decode_all_from = moment - _SKIP_MARGIN_FRAMES * self.timeline.step
        # 3. Decode up to the moment.
        self._go_to(moment)
        if self._shown is not None and self._shown[0] < self._last_skipped:
            # After a long pause between frames, a skipped frame may be the one on screen.
            self._can_skip = False
            self._decode_all_from = self._last_skipped = _BEFORE_ALL
            self._seek(moment)
            self._go_to(moment)
        if self._shown is None:
            raise VideoError("it contains no frame that can be decoded")
        # 4. The file has ended: the last frame may stand for its own duration, and not for a truncated rest.
        if self._ahead is None:
            start, frame = self._shown
            end = start + max(frame.duration or 0, self.timeline.step) - self.timeline.start
            self.check_end(float(end * self.timeline.tick_s))
        return self._shown[1]

    def check_end(self, end_s: float) -> None:
        """Raises `VideoError` if the frames end well before the picture should, by more than a tenth and a second.

        Args:
            end_s: Time at which the last frame leaves the screen, in seconds from the start of the clip.
        """
        check_missing(self.duration_s - end_s, self.duration_s)

    def _tick_of(self, moment_s: float) -> int:
        # A moment that coincides with a frame means that frame, hence the margin.
        return self.timeline.start + math.floor(moment_s / self.timeline.tick_s + 1e-6)

    def _in_seconds(self, times: list[int]) -> list[float]:
        return [
            min(max(0.0, float((moment - self.timeline.start) * self.timeline.tick_s)), self.duration_s)
            for moment in times
        ]

    @contextmanager
    def _reopened(self) -> Iterator[tuple[InputContainer, VideoStream]]:
        """Opens another container to scan the whole clip beforehand, as not every format can be rewound."""
        with self._file.open_container(max(0.001, self._deadline_s - time.monotonic())) as container:
            yield container, find_video_stream(container, self._limits.max_pixels)

    def _first_time(self) -> int:
        self._go_to(_BEFORE_ALL)
        return self.timeline.start if self._shown is None else self._shown[0]

    def _go_to(self, moment: int) -> None:
        if not self._is_started:
            self._ahead, self._is_started = next(self._frames, None), True
        # The frame on screen is the last one that begins before or at the moment.
        while self._ahead is not None and (self._shown is None or self._ahead[0] <= moment):
            self._shown, self._ahead = self._ahead, next(self._frames, None)

    def _saves_decoding(self, moment: int) -> bool:
        """Returns whether a known key frame lies far enough ahead of the decoder's position and not after `moment`."""
        if self._is_started and self._ahead is None:
            return False
        position = (self._ahead[0] if self._ahead else self.timeline.start) + _MIN_SEEK_FRAMES * self.timeline.step
        if not self.timeline.is_indexed:
            keys = self._keys_until(moment)
            return bool(keys) and keys[-1].time > position
        index = self._stream.index_entries
        # The index contains decoding times, which are earlier because frames are reordered.
        delay = max(0, self.timeline.start - index[0].timestamp)
        entry = index.search_timestamp(moment - delay, backward=True)
        return entry >= 0 and index[entry].timestamp + delay > position

    def _seek(self, moment: int) -> None:
        """Continues from a key frame that is not later than `moment`, the last one if possible.

        Indices and timestamps of files can be wrong, and some key frames only begin to build up a picture. So the
        position after a seek and the first decoded frame are checked, and a seek further back is tried if they do not
        fit; as the last resort everything is decoded from the start.
        """
        for packets in self._seek_attempts(moment):
            key = next(packets)
            self._frames = self._decode(chain([key], packets), key.pts if key.pts is not None else _BEFORE_ALL)
            with suppress(av.error.InvalidDataError):  # from references to frames that were not decoded
                self._shown, self._ahead, self._is_started = None, next(self._frames, None), True
                if self._ahead is not None and self._ahead[0] <= moment and self._ahead[1].key_frame:
                    return
        # No attempt succeeded: this file is decoded from its start, completely and without further seeks.
        self._can_seek = self._can_skip = False
        self._decode_all_from = self._last_skipped = _BEFORE_ALL
        self._shown, self._ahead, self._is_started = None, None, False
        self._frames = self._decode_all()

    def _seek_attempts(self, moment: int) -> Iterator[Iterator[Packet[VideoStream]]]:
        """Yields the packets from key frames that are not later than `moment`, each time from further back."""
        if self.timeline.is_indexed:
            second = math.ceil(1 / self.timeline.tick_s)
            # Some key frames lack part of the picture, so earlier ones are tried too.
            for goal in (moment, moment - second, moment - 10 * second, self.timeline.start):
                packets = self._packets_from(max(goal, self.timeline.start))
                packet = next(packets, None)
                if packet is not None and packet.is_keyframe and packet.pts is not None and packet.pts <= moment:
                    yield chain([packet], packets)
            return
        keys = self._keys_until(moment)
        for back in _KEYS_BACK:
            if back <= len(keys) and (from_key := self._find_key(keys[-back])) is not None:
                yield from_key

    def _find_key(self, key: KeyPacket) -> Iterator[Packet[VideoStream]] | None:
        """Returns the packets from `key` on, or None if no seek leads to it."""
        # Formats seek by display times or by decoding times, and some stop late, hence a second earlier.
        for goal in (key.time, key.decoding_time, key.decoding_time - math.ceil(1 / self.timeline.tick_s)):
            packets = self._packets_from(goal)
            for packet in packets:
                check_deadline(self._deadline_s)
                if packet.pts == key.time and packet.size == key.size:
                    return chain([packet], packets)
                if packet.dts is not None and packet.dts > key.decoding_time:
                    break
        return None

    def _packets_from(self, goal: int) -> Iterator[Packet[VideoStream]]:
        try:
            self._container.seek(goal, stream=self._stream)
        except av.FFmpegError:  # the format cannot seek, or not to this position
            return iter(())
        return self._container.demux(self._stream)

    def _keys_until(self, moment: int) -> tuple[KeyPacket, ...]:
        keys = self.timeline.keys
        return keys[: bisect.bisect_right(keys, moment, key=lambda key: key.time)]

    def _decode_all(self) -> Iterator[tuple[int, VideoFrame]]:
        with self._reopened() as (container, stream):
            yield from self._decode(container.demux(stream), _BEFORE_ALL)

    def _decode(self, packets: Iterable[Packet[VideoStream]], first: int) -> Iterator[tuple[int, VideoFrame]]:
        """Yields (time, frame) in display order from `first` on; earlier ones refer to frames that were not decoded."""
        return ((moment, frame) for moment, frame in self.timeline.clock(self._counted(packets)) if moment >= first)

    def _counted(self, packets: Iterable[Packet[VideoStream]]) -> Iterator[Packet[VideoStream]]:
        for packet in packets:
            check_deadline(self._deadline_s)
            self._update_skipping(packet)
            self.num_packets += packet.size > 0
            yield packet

    def _update_skipping(self, packet: Packet[VideoStream]) -> None:
        is_skipping = packet.pts is not None and packet.pts < self._decode_all_from
        if is_skipping != self._is_skipping:
            self._is_skipping = is_skipping
            self._stream.codec_context.skip_frame = "NONREF" if is_skipping else "DEFAULT"
        if packet.pts is not None and is_skipping:
            self._last_skipped = max(self._last_skipped, packet.pts)
