"""Frames of an open video at given moments, decoding as little as possible.

All times are integer ticks of the stream's time base unless a name ends in `_s`. The frame *at* a moment is the one on screen then:
the last whose timestamp is not later. That holds with a variable frame rate too.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterable, Iterator
from fractions import Fraction
from itertools import chain
from pathlib import Path

import av
from av.container import InputContainer
from av.packet import Packet
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

_MIN_SEEK_FRAMES = 4  # below this, decoding on is cheaper than refilling the decoder after a seek
_DEFAULT_FPS = 25  # for the spacing of frames without timestamps or rate


class VideoError(Exception):
    """A video that cannot be read; the message is one sentence and says why."""


def open_container(path: Path, timeout_s: float) -> InputContainer:
    """The open container of `path`.

    Only this file is opened, whatever it says: a playlist renamed to .mp4 cannot send us to other files or the network. Metadata is
    not ours, so text in a legacy Korean encoding must not stop us.
    """
    return av.open(f"file:{path}", timeout=timeout_s, metadata_errors="replace", options={"protocol_whitelist": "file"})


def find_video_stream(container: InputContainer, max_pixels: int) -> VideoStream:
    """The main video stream of `container`, set to decode on one thread (data workers are processes already).

    Raises:
        VideoError: There is no video stream (cover art is none), or a frame has no pixels or more than `max_pixels`.
    """
    stream = container.streams.best("video")
    if not isinstance(stream, VideoStream) or stream.disposition & Disposition.attached_pic:
        raise VideoError("it has no video stream")
    check_size(stream.width, stream.height, max_pixels)
    stream.thread_count = 1
    return stream


def check_size(width: int, height: int, max_pixels: int) -> None:
    """Nothing, for a frame of 1 to `max_pixels` pixels; `VideoError` otherwise."""
    if not 0 < width * height <= max_pixels:
        raise VideoError(f"its frames are {width}x{height}, outside the allowed 1 to {max_pixels} pixels")


class FrameReader:
    """The frames of one clip at ascending moments.

    Args:
        path: The file of `container`, opened again only to measure a duration that the header lacks.
        container: Just opened.
        deadline_s: `time.monotonic()` at which reading stops with a `VideoError`.
        max_pixels: Largest frame to accept.
    """

    def __init__(self, path: Path, container: InputContainer, deadline_s: float, max_pixels: int) -> None:
        self._path, self._container, self._deadline_s = path, container, deadline_s
        self._stream = find_video_stream(container, max_pixels)
        rate = self._stream.average_rate or self._stream.guessed_rate or Fraction(_DEFAULT_FPS)
        self._tick_s = self._stream.time_base or 1 / rate
        self._step = max(1, round(1 / (rate * self._tick_s)))
        self._start = self._stream.start_time or 0
        self._has_own_duration = True
        self._duration = self._read_duration()
        self._frames = self._decode(container.demux(self._stream), first=self._start - self._step)
        self._shown: tuple[int, VideoFrame] | None = None
        self._ahead: tuple[int, VideoFrame] | None = None
        self._is_started = False

    @property
    def duration_s(self) -> float:
        """Length of the clip in seconds; that of one frame where nothing else is known."""
        return float(self._duration * self._tick_s)

    def frame_at(self, moment_s: float) -> VideoFrame:
        """The frame on screen `moment_s` seconds after the start of the clip; moments must not descend.

        Raises:
            VideoError: The clip ends well before it should, holds no frame at all, or the deadline has passed.
        """
        moment = self._start + math.floor(moment_s / self._tick_s + 1e-6)  # a moment that falls on a frame means that frame
        if self._saves_decoding(moment):
            self._seek(moment)
        if not self._is_started:
            self._ahead, self._is_started = next(self._frames, None), True
        while self._ahead is not None and (self._shown is None or self._ahead[0] <= moment):
            self._shown, self._ahead = self._ahead, next(self._frames, None)
        if self._shown is None:
            raise VideoError("it holds no frame that can be decoded")
        if self._ahead is None:
            self._check_end(*self._shown)
        return self._shown[1]

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

    def _measure_duration(self) -> int:
        """Read, without decoding, to the end in a container of its own: not every format can be rewound."""
        end, num_packets = self._start, 0
        with open_container(self._path, max(0.001, self._deadline_s - time.monotonic())) as container:
            for packet in container.demux(container.streams.video[0]):
                self._check_deadline()
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
            self._check_deadline()
            for frame in packet.decode():
                moment = following if frame.pts is None else frame.pts
                following = moment + self._step
                if moment >= first:
                    yield moment, frame

    def _check_deadline(self) -> None:
        if time.monotonic() > self._deadline_s:
            raise VideoError("decoding took longer than data.decode_timeout_s allows")

    def _check_end(self, moment: int, frame: VideoFrame) -> None:
        """`VideoError` if the last frame ends more than a tenth and a second before the stream's stated duration."""
        end = moment + max(frame.duration or 0, self._step) - self._start
        missing_s = float((self._duration - end) * self._tick_s)
        if self._has_own_duration and missing_s > max(1.0, 0.1 * self.duration_s):
            raise VideoError(f"it is truncated: {missing_s:.1f} of {self.duration_s:.1f} seconds are missing")
