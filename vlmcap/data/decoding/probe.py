"""What a video or image is, at the cost of its header and first frame."""

from __future__ import annotations

import time
from dataclasses import dataclass

from vlmcap.data.decoding.container import DecodeLimits, MediaFile, explained
from vlmcap.data.decoding.frame_reader import FrameReader
from vlmcap.data.decoding.images import count_frames, is_image, open_image


@dataclass(frozen=True)
class VideoInfo:
    """What is known of a video or image.

    Attributes:
        width: Pixels, upright.
        height: Pixels, upright.
        duration_s: Seconds; 0 for an image.
        fps: Frames a second on average; 0 for an image.
        num_frames: As the header says, else the duration times `fps`.
        rotation: Degrees, counter-clockwise, by which the stored picture is turned to be upright: 0, 90, 180 or 270; 0 for an image
            that is stored mirrored only.
        codec: Name of the codec, or of the image's format, in small letters.
        is_image: Whether it is an image, animated or not.
    """

    width: int
    height: int
    duration_s: float
    fps: float
    num_frames: int
    rotation: int
    codec: str
    is_image: bool


_EXIF_ORIENTATION = 0x0112
_EXIF_ROTATIONS = {3: 180, 4: 180, 5: 270, 6: 270, 7: 90, 8: 90}


def probe(address: str, limits: DecodeLimits | None = None) -> VideoInfo:
    """What the file at `address` is; one frame of it is decoded.

    Raises:
        VideoError: It is no video or image, or is outside the limits.
    """
    limits, file = limits or DecodeLimits(), MediaFile(address)
    deadline_s = time.monotonic() + limits.timeout_s
    with explained(file.name), file.open_bytes() as stream:
        if is_image(stream):
            with open_image(stream, limits) as image:
                rotation = _EXIF_ROTATIONS.get(image.getexif().get(_EXIF_ORIENTATION, 1), 0)
                size = (image.height, image.width) if rotation % 180 else image.size
                return VideoInfo(*size, 0.0, 0.0, count_frames(image), rotation, (image.format or "").lower(), is_image=True)
        with file.open_container(limits.timeout_s, stream) as container:
            reader = FrameReader(file, container, deadline_s, limits)
            frame = reader.frame_at(0.0)
            rotation = round(frame.rotation / 90) % 4 * 90
            size = (frame.height, frame.width) if rotation % 180 else (frame.width, frame.height)
            return VideoInfo(*size, reader.duration_s, reader.fps, reader.num_frames, rotation, reader.codec, is_image=False)
