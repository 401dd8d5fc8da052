"""Frames of an open video at given moments, decoding as little as possible.

All times are integer ticks of the stream's time base unless a name ends in `_s`. The frame *at* a moment is the one on screen then:
the last whose timestamp is not later. That holds with a variable frame rate too.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from itertools import chain

import av
from av.container import InputContainer
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from numpy.random import Generator

from vlmcap.data.decoding.container import DecodeLimits, MediaFile, VideoError, check_deadline, find_video_stream
from vlmcap.data.decoding.key_frames import has_whole_index, key_frame_times, picture_changes
from vlmcap.data.decoding.sampling import FrameSampling, adaptive_moments, choose_moments, jitter_moments, keyframe_moments

_MIN_SEEK_FRAMES = 4  # below this, decoding on is cheaper than refilling the decoder after a seek
_SKIP_MARGIN_FRAMES = 4  # so far ahead of a wanted moment, frames that no other frame leans on are not decoded
_DEFAULT_FPS = 25  # for the spacing of frames without timestamps or rate


class FrameReader:
    """The frames of one clip at ascending moments.

    Attributes:
        num_packets: Compressed frames given to the decoder so far, which drops some without decoding them.

    Args:
        file: The file of `container`, opened again only to measure a duration that the header lacks.
        container: Just opened.
        deadline_s: `time.monotonic()` at which reading stops with a `VideoError`.
        limits: What else the clip may cost.
    """

    def __init__(self, file: MediaFile, container: InputContainer, deadline_s: float, limits: DecodeLimits) -> None:
        self._file, self._container, self._deadline_s, self._limits = file, container, deadline_s, limits
        self._stream = find_video_stream(container, limits.max_pixels)
        self._rate = self._stream.average_rate or self._stream.guessed_rate or Fraction(_DEFAULT_FPS)
        self._tick_s = self._stream.time_base or 1 / self._rate
        self._step = max(1, round(1 / (self._rate * self._tick_s)))
        self._start = self._stream.start_time or 0
        self._has_own_duration = True
        self._duration = self._read_duration()
        if self.duration_s > limits.max_duration_s:
            raise VideoError(f"it claims to last {self.duration_s:.0f} seconds, more than the allowed {limits.max_duration_s:.0f}")
        self._frames = self._decode(container.demux(self._stream), first=self._start - self._step)
        self._shown: tuple[int, VideoFrame] | None = None
        self._ahead: tuple[int, VideoFrame] | None = None
        self._is_started = False
        # Only H.264 marks such frames for all layers, and a mistake is only mended where one can seek back.
        self._can_skip = self.codec == "h264" and self.has_whole_index
        self._whole_from, self._is_skipping, self._last_skipped = self._start, False, self._start - self._step
        self.num_packets = 0

    @property
    def duration_s(self) -> float:
        """Length of the clip in seconds; that of one frame where nothing else is known."""
        return float(self._duration * self._tick_s)

    @property
    def fps(self) -> float:
        """Frames a second, on average."""
        return float(self._rate)

    @property
    def num_frames(self) -> int:
        """Frames of the clip as its header says, else estimated by its rate."""
        return self._stream.frames or max(1, round(self.duration_s * self.fps))

    @property
    def codec(self) -> str:
        """Name of the codec."""
        return self._stream.codec_context.name

    @property
    def has_whole_index(self) -> bool:
        """Whether the file says where each frame is (MP4 and AVI do), so that seeking is exact."""
        return has_whole_index(self._stream)

    def choose_moments(self, sampling: FrameSampling, rng: Generator | None) -> list[float]:
        """The moments that `sampling` takes of this clip, ascending, in seconds from its start.

        Raises:
            VideoError: The deadline has passed.
        """
        if sampling.kind == "keyframe":
            with self._reopened() as (container, stream):
                times = key_frame_times(container, stream, sampling.num_frames, self._deadline_s)
            moments = keyframe_moments(self._in_seconds(times), self.duration_s, sampling.num_frames)
        elif sampling.kind == "adaptive":
            with self._reopened() as (container, stream):
                times, changes = picture_changes(container, stream, sampling.num_frames, self._duration, self._deadline_s)
            moments = adaptive_moments(self._in_seconds(times), changes, self.duration_s, sampling.num_frames)
        else:
            return choose_moments(sampling, self.duration_s, rng)
        return jitter_moments(moments, sampling, self.duration_s, rng)

    def stream_time_s(self, moment_s: float) -> float:
        """The stream's own time of a moment of the clip: amid the tick that decides which frame is on screen."""
        return float((self._tick_of(moment_s) + Fraction(1, 2)) * self._tick_s)

    def frame_at(self, moment_s: float) -> VideoFrame:
        """The frame on screen `moment_s` seconds after the start of the clip; moments must not descend.

        Raises:
            VideoError: The clip ends well before it should, holds no frame at all, or the deadline has passed.
        """
        moment = self._tick_of(moment_s)
        if self._saves_decoding(moment):
            self._seek(moment)
        if self._can_skip:
            self._whole_from = moment - _SKIP_MARGIN_FRAMES * self._step
        self._go_to(moment)
        if self._shown is not None and self._shown[0] < self._last_skipped:
            # A long pause between frames: one that was skipped may be on screen.
            self._can_skip, self._whole_from, self._last_skipped = False, self._start, self._start - self._step
            self._seek(moment)
            self._go_to(moment)
        if self._shown is None:
            raise VideoError("it holds no frame that can be decoded")
        if self._ahead is None:
            start, frame = self._shown
            self.check_end(float((start + max(frame.duration or 0, self._step) - self._start) * self._tick_s))
        return self._shown[1]

    def _tick_of(self, moment_s: float) -> int:
        return self._start + math.floor(moment_s / self._tick_s + 1e-6)  # a moment that falls on a frame means that frame

    def _go_to(self, moment: int) -> None:
        if not self._is_started:
            self._ahead, self._is_started = next(self._frames, None), True
        while self._ahead is not None and (self._shown is None or self._ahead[0] <= moment):
            self._shown, self._ahead = self._ahead, next(self._frames, None)

    def _read_duration(self) -> int:
        stream = self._stream
        if stream.duration and stream.duration > 0:
            return stream.duration
        if tag := re.fullmatch(r"(\d+):(\d+):(\d+(?:\.\d+)?)", stream.metadata.get("DURATION", "")):  # Matroska
            hours, minutes, seconds = (Fraction(part) for part in tag.groups())
            return max(self._step, round((hours * 3600 + minutes * 60 + seconds) / self._tick_s))
        self._has_own_duration = False  # the container's may be that of a longer sound track
        if self._container.duration and self._container.duration > 0:
            return max(self._step, round(Fraction(self._container.duration, av.time_base) / self._tick_s))
        return self._measure_duration()

    @contextmanager
    def _reopened(self) -> Iterator[tuple[InputContainer, VideoStream]]:
        """A container of its own, for looking at the whole clip beforehand: not every format can be rewound."""
        with self._file.open_container(max(0.001, self._deadline_s - time.monotonic())) as container:
            yield container, find_video_stream(container, self._limits.max_pixels)

    def _in_seconds(self, times: list[int]) -> list[float]:
        return [min(max(0.0, float((moment - self._start) * self._tick_s)), self.duration_s) for moment in times]

    def _measure_duration(self) -> int:
        """Read, without decoding, to the end."""
        end, num_packets = self._start, 0
        with self._reopened() as (container, stream):
            for packet in container.demux(stream):
                check_deadline(self._deadline_s)
                num_packets += packet.size > 0
                if packet.pts is not None:
                    end = max(end, packet.pts + (packet.duration or self._step))
        return max(self._step, end - self._start if end > self._start else num_packets * self._step)

    def _saves_decoding(self, moment: int) -> bool:
        """Whether a key frame lies between the decoder's position and `moment`, far enough ahead; unknown means no."""
        index = self._stream.index_entries
        if not len(index) or (self._is_started and self._ahead is None):
            return False
        delay = max(0, self._start - index[0].timestamp)  # the index holds decoding times, earlier by the reordering of frames
        entry = index.search_timestamp(moment - delay, backward=True)
        position = self._ahead[0] if self._ahead else self._start
        return entry >= 0 and index[entry].timestamp + delay > position + _MIN_SEEK_FRAMES * self._step

    def _seek(self, moment: int) -> None:
        """Go on from the last key frame that is not later than `moment`.

        Some formats land late by the reordering of frames, so the landing is checked and tried again from further back.
        """
        second = math.ceil(1 / self._tick_s)
        for goal in (moment, moment - second, moment - 10 * second, self._start):
            self._container.seek(max(goal, self._start), stream=self._stream)
            packets = self._container.demux(self._stream)
            packet = next(packets, None)
            if packet is not None and packet.pts is not None and packet.pts <= moment:
                break
        else:
            raise VideoError("its index of key frames is damaged")
        # Frames before the key frame lean on frames that were not decoded.
        self._frames = self._decode(chain([packet], packets), first=packet.pts)
        self._shown, self._ahead, self._is_started = None, None, False

    def _decode(self, packets: Iterable[Packet[VideoStream]], first: int) -> Iterator[tuple[int, VideoFrame]]:
        """(timestamp, frame) in the order of display, from `first` on; frames without a timestamp are spaced evenly."""
        following = self._start
        for packet in packets:
            check_deadline(self._deadline_s)
            self._choose_skipping(packet)
            self.num_packets += packet.size > 0
            for frame in packet.decode():
                moment = following if frame.pts is None else frame.pts
                following = moment + self._step
                if moment >= first:
                    yield moment, frame

    def _choose_skipping(self, packet: Packet[VideoStream]) -> None:
        is_skipping = packet.pts is not None and packet.pts < self._whole_from
        if is_skipping != self._is_skipping:
            self._is_skipping = is_skipping
            self._stream.codec_context.skip_frame = "NONREF" if is_skipping else "DEFAULT"
        if packet.pts is not None and is_skipping:
            self._last_skipped = max(self._last_skipped, packet.pts)

    def check_end(self, end_s: float) -> None:
        """`VideoError` if the frames end more than a tenth and a second before the stream's stated duration.

        Args:
            end_s: Seconds from the start of the clip at which its last frame leaves the screen.
        """
        missing_s = self.duration_s - end_s
        if self._has_own_duration and missing_s > max(1.0, 0.1 * self.duration_s):
            raise VideoError(f"it is truncated: {missing_s:.1f} of {self.duration_s:.1f} seconds are missing")
