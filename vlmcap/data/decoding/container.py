"""Opening of media files, with the protections that untrusted files require.

PyAV is imported when a video is opened, so that images and stored features do not need it.
"""

from __future__ import annotations

import errno
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, BinaryIO

from vlmcap.data.media import MediaError, local_path, open_media

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.stream import VideoStream

# Formats that contain video themselves. Playlists, edit lists of other files and numbered pictures (hls, dash, concat,
# imf, image2, …) are excluded on purpose: they make the library open arbitrary files that they name.
_FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,mpegtsraw,flv,asf,ogg,mxf,nut,rm,wtv,dv,ivf,obu,av1,h264,hevc,vvc,m4v,"
    "mjpeg,gif,vc1,yuv4mpegpipe"
)
_TOO_SLOW = "decoding took longer than data.decode_timeout_s allows"
# Errors of a disk, a network or a full table of open files, not of the file's content.
_TRANSIENT = {
    getattr(errno, name)
    for name in (
        "EIO",
        "ESTALE",
        "EMFILE",
        "ENFILE",
        "ENOMEM",
        "EINTR",
        "EAGAIN",
        "ETIMEDOUT",
        "ECONNRESET",
        "EHOSTUNREACH",
        "EACCES",
    )
    if hasattr(errno, name)
}
_READ_BYTES = 1 << 20  # per read from file objects, since each read crosses into Python


class VideoError(Exception):
    """A video or image that cannot be read; the message is one sentence that gives the reason.

    Args:
        message: The reason.
        is_final: False if the file may be good and a retry may succeed: time ran out, or the disk or network failed.
    """

    def __init__(self, message: str, *, is_final: bool = True) -> None:
        super().__init__(message)
        self.is_final = is_final


@dataclass(frozen=True)
class DecodeLimits:
    """Limits on one clip, besides `data.decode_timeout_s`.

    Attributes:
        max_pixels: Largest number of pixels per frame.
        max_duration_s: Longest duration that a header may state.
    """

    max_pixels: int = 7680 * 4320  # 8K
    max_duration_s: float = 24 * 3600.0


@dataclass(frozen=True)
class MediaFile:
    """A media file at an address, which can be opened several times, since not all formats can be rewound."""

    address: str

    @property
    def name(self) -> str:
        """Name of the file in messages."""
        return self.address if "://" in self.address else PurePosixPath(self.address).name

    @contextmanager
    def open_bytes(self) -> Iterator[BinaryIO]:
        """Opens the file, seekable.

        Raises:
            VideoError: The file does not exist or is empty.
            MediaError: A member or a remote file cannot be read.
        """
        path = local_path(self.address)
        if path is not None and not path.is_file():  # opening a pipe would block forever
            raise VideoError("there is no such file")
        with open_media(self.address) as stream:
            if not stream.read(1):
                raise VideoError("the file is empty")
            stream.seek(0)
            yield stream

    @contextmanager
    def open_container(self, timeout_s: float, stream: BinaryIO | None = None) -> Iterator[InputContainer]:
        """Opens the container of a file.

        No other file is opened, whatever this one contains: a playlist renamed to .mp4 cannot lead to other files or
        the network. Metadata is not used, so text in a legacy Korean encoding must not cause an error.

        Args:
            timeout_s: Time limit for opening the container.
            stream: Stream from `open_bytes`, so that the file is not opened again.
        """
        import av

        with ExitStack() as stack:
            path = local_path(self.address)
            source: str | BinaryIO
            if path is not None:  # the library reads it faster than through a file object
                source, protocols = f"file:{path}", "file"
            else:
                # Without any protocol, the library can read nothing but this stream.
                source, protocols = stream or stack.enter_context(self.open_bytes()), "none"
            options = {"protocol_whitelist": protocols, "format_whitelist": _FORMATS}
            yield stack.enter_context(
                av.open(
                    source, "r", timeout=timeout_s, metadata_errors="replace", options=options, buffer_size=_READ_BYTES
                )
            )


@contextmanager
def video_errors(name: str) -> Iterator[None]:
    """Converts the exceptions of libraries on bad files into a `VideoError` of one sentence that names the file."""
    try:
        yield
    except MemoryError:  # PyAV's is also one of its other errors, but says nothing about the file
        raise
    except MediaError as error:  # its message names the file
        raise VideoError(str(error), is_final=False) from error
    except VideoError as error:
        raise VideoError(f"{name} cannot be read: {error}", is_final=error.is_final) from error
    except _reading_errors() as error:
        if type(error).__name__ == "ExitError":  # the library's own timeout while it opens a file
            raise VideoError(f"{name} cannot be read: {_TOO_SLOW}", is_final=False) from error
        reason = getattr(error, "strerror", None) or type(error).__name__
        if getattr(error, "errno", None) in _TRANSIENT:
            raise VideoError(f"{name} cannot be read: the system reports {reason}", is_final=False) from error
        raise VideoError(f"{name} cannot be read: it is damaged, truncated or not a video ({reason})") from error


def _reading_errors() -> tuple[type[Exception], ...]:
    """Returns the exceptions that bad files raise; those of PyAV only if it was imported to open a video."""
    av: Any = sys.modules.get("av")
    errors = (OSError, ValueError)  # ValueError: a pixel format that cannot become RGB
    return errors if av is None else (av.FFmpegError, *errors)


def find_video_stream(container: InputContainer, max_pixels: int) -> VideoStream:
    """Returns the main video stream of `container`, set to decode on one thread, as data workers are processes already.

    Raises:
        VideoError: There is no video stream (cover art does not count), or its frames have no pixels or more than
            `max_pixels`.
    """
    from av.stream import Disposition
    from av.video.stream import VideoStream

    stream = container.streams.best("video")
    # Covers of audio files are video streams of one picture.
    if not isinstance(stream, VideoStream) or stream.disposition & Disposition.attached_pic:
        raise VideoError("it has no video stream")
    if getattr(stream, "codec_context", None) is None:
        raise VideoError("its codec is unknown")
    check_size(stream.width, stream.height, max_pixels)
    stream.thread_count = 1
    return stream


def check_size(width: int, height: int, max_pixels: int) -> None:
    """Raises `VideoError` unless a frame has 1 to `max_pixels` pixels."""
    if not 0 < width * height <= max_pixels:
        raise VideoError(f"its frames are {width}x{height}, outside the allowed 1 to {max_pixels} pixels")


def check_deadline(deadline_s: float) -> None:
    """Raises `VideoError` if `time.monotonic()` is past `deadline_s`."""
    if time.monotonic() > deadline_s:
        raise VideoError(_TOO_SLOW, is_final=False)
