"""Small pictures of clips, as a page carries them within itself.

Legend: F frames, H/W pixels.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any

from vlmcap.errors import UserError
from vlmcap.reporting.report.data import ClipRow

NUM_FRAMES = 4  # a clip
HEIGHT = 84  # of a picture, in pixels
MAX_WIDTH = 200
MAX_CLIPS = 60
MAX_BYTES = 2_500_000  # of all pictures together, as the page carries them
FULL = "full"  # the reason of a clip whose pictures the page has no room for
_QUALITIES = (72, 50, 30)  # of JPEG; the first one at which a picture is small enough is taken
_SMALL_ENOUGH = 7_000  # bytes a picture
_TIMEOUT_S = 10.0  # a clip


@dataclass(frozen=True, slots=True)
class Pictures:
    """Frames of a clip.

    Attributes:
        frames: JPEG files as base64, in the order of time; none if they cannot be shown.
        reason: Why there are none, else empty.
    """

    frames: tuple[str, ...] = ()
    reason: str = ""


def clip_pictures(video: str, num_frames: int = NUM_FRAMES, height: int = HEIGHT) -> Pictures:
    """Frames at the centres of equal parts of a clip.

    A file that is missing or cannot be read is told in `reason`: a report is written of runs whose videos may lie elsewhere.

    Args:
        video: Path or address of the video or image.
        num_frames: F, at least 1; a shorter clip has fewer.
        height: In pixels; smaller pictures stay as they are, wide ones are at most `MAX_WIDTH` wide.
    """
    from vlmcap.data.decoding.video import DecodeLimits, FrameSampling, VideoError, read_frames

    if not video:
        return Pictures(reason="the predictions name no video")
    try:
        frames = read_frames(video, FrameSampling(num_frames=num_frames), limits=DecodeLimits(timeout_s=_TIMEOUT_S))
    except (VideoError, UserError, OSError) as error:
        return Pictures(reason=str(error))
    pixels = frames.permute(0, 2, 3, 1).contiguous().numpy()
    return Pictures(tuple(base64.b64encode(_as_jpeg(picture, height)).decode() for picture in pixels))


def pictures_of(
    clips: Sequence[ClipRow],
    *,
    max_clips: int = MAX_CLIPS,
    max_bytes: int = MAX_BYTES,
    advance: Callable[[], object] = lambda: None,
) -> dict[str, Pictures]:
    """Frames of the clips of a report, by clip id, within a bound that a page can carry.

    Args:
        clips: The first ones matter most.
        max_clips: Clips that get pictures.
        max_bytes: All pictures together; the clips after it get none.
        advance: Called once a clip.
    """
    found, total = {}, 0
    for index, clip in enumerate(clips):
        is_room = index < max_clips and total < max_bytes
        pictures = clip_pictures(clip.video) if is_room else Pictures(reason=FULL)
        total += sum(map(len, pictures.frames))
        found[clip.id] = pictures
        advance()
    return found


def _as_jpeg(pixels: Any, height: int) -> bytes:
    """A frame, uint8 (H, W, 3), as the bytes of a small JPEG file."""
    from PIL import Image

    picture = Image.fromarray(pixels)
    picture.thumbnail((MAX_WIDTH, height), Image.Resampling.LANCZOS)
    content = b""
    for quality in _QUALITIES:
        file = BytesIO()
        picture.save(file, "JPEG", quality=quality, optimize=True)
        content = file.getvalue()
        if len(content) <= _SMALL_ENOUGH:
            break
    return content
