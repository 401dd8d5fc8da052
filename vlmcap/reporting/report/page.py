"""The page of a report: a single HTML file in English and Korean, with a light and a dark theme.

Legend: F frames, H/W pixels.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from io import BytesIO
from typing import Any

from vlmcap.errors import UserError
from vlmcap.metrics.scores import METRIC_LABELS
from vlmcap.reporting.report.records import ClipRow, Report

SCRIPTS = ("words.js", "dom.js", "leaderboard.js", "charts.js", "clips.js", "run.js", "main.js")
MAX_CURVE_POINTS = 240  # more points of a curve cannot be distinguished on a screen
_DIGITS = 6  # significant digits of numbers in the page

_LABELS = METRIC_LABELS | {"loss": "Loss"}
NUM_FRAMES = 4  # frames shown per clip
HEIGHT = 84  # pixels; height of a frame
MAX_WIDTH = 200  # pixels; width of a frame
MAX_CLIPS = 60  # clips with frames
MAX_BYTES = 2_500_000  # base64 bytes of all frames in the page
FULL = "full"  # reason of a clip without frames because the page has reached its limits
_QUALITIES = (72, 50, 30)  # JPEG qualities, tried until a frame is at most _MAX_FRAME_BYTES large
_MAX_FRAME_BYTES = 7_000
_TIMEOUT_S = 10.0  # seconds to decode a clip


@dataclass(frozen=True, slots=True)
class ClipFrames:
    """Frames of a clip.

    Attributes:
        frames: JPEG files as base64, in temporal order; empty if they cannot be shown.
        reason: Why there are no frames; empty if there are.
    """

    frames: tuple[str, ...] = ()
    reason: str = ""


def report_page(report: Report, pictures: Mapping[str, ClipFrames] | None = None) -> str:
    """Returns the whole page.

    Everything in the report is treated as data: the page's code inserts it as text only, and a content security policy
    lets the browser run nothing else and fetch nothing.

    Args:
        report: Report to show.
        pictures: Frames by clip id, for clips without `thumbnails`.
    """
    style, script = _web_file("page.css"), "".join(_web_file(name) for name in SCRIPTS)
    data = _embedded(page_data(report, pictures or {}))
    # The page loads nothing from elsewhere, and runs only the script whose hash is stated.
    policy = (
        f"default-src 'none'; img-src data:; style-src {_hash(style)}; script-src {_hash(script)}; "
        "base-uri 'none'; form-action 'none'"
    )
    return (
        f'<!doctype html>\n<html lang="en" data-theme="light"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(policy)}">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{escape(report.title)}</title>'
        f'<link rel="icon" href="data:,"><style>{style}</style></head>\n<body><div id="bar"></div><main id="page">'
        f"<h1>{escape(report.title)}</h1><noscript>This page needs JavaScript. 이 페이지는 JavaScript가 "
        "필요합니다.</noscript></main>\n"
        f'<script type="application/json" id="data">{data}</script>\n<script>{script}</script></body></html>\n'
    )


def page_data(report: Report, pictures: Mapping[str, ClipFrames]) -> dict[str, Any]:
    """Returns the data embedded in the page: the report as compact plain data, with labels and frames."""
    plain = report.plain()
    # Keys that all runs share are stored once.
    common = _common_config([run["config"] for run in plain["runs"]])
    for run in plain["runs"]:
        run["config"] = {key: value for key, value in run["config"].items() if key not in common}
        run["curve"] = {name: _thinned(points) for name, points in run["curve"].items()}
    for clip in plain["clips"]:
        picture = pictures.get(clip["id"])
        clip["thumbnails"] = clip["thumbnails"] or ([] if picture is None else list(picture.frames))
        clip["picture_note"] = "" if picture is None else picture.reason
    small: dict[str, Any] = _rounded(plain | {"common_config": common, "labels": _LABELS})
    return small


def _web_file(name: str) -> str:
    return (files("vlmcap.reporting.report") / "web" / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """Returns the hash of a script or style as written in a content security policy."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _embedded(data: Any) -> str:
    """Serializes data to JSON with escapes, so that no text in it can end the surrounding script element."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return (
        # U+2028 and U+2029 end a line in older JavaScript, but not in JSON.
        text.replace("<", "\\u003c")
        .replace(">", "\\u003e")
        .replace("&", "\\u0026")
        .replace("\u2028", "\\u2028")
        .replace("\u2029", "\\u2029")
    )


def _common_config(configs: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns the keys with the same value in all configurations; storing them once halves a page of many runs."""
    known = [config for config in configs if config]
    if len(known) < 2:
        return {}
    return {
        key: value
        for key, value in known[0].items()
        if all(key in config and config[key] == value for config in known[1:])
    }


def _thinned(points: list[Any]) -> list[Any]:
    if len(points) <= MAX_CURVE_POINTS:
        return points
    # The first and the last point are always among them.
    return [points[round(index * (len(points) - 1) / (MAX_CURVE_POINTS - 1))] for index in range(MAX_CURVE_POINTS)]


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list | tuple) else value


def read_clip_frames(video: str, num_frames: int = NUM_FRAMES, height: int = HEIGHT) -> ClipFrames:
    """Reads frames at the centres of equal segments of a clip.

    A missing or unreadable file is reported in `reason` and is not an error, as the videos of old runs may have moved.

    Args:
        video: Path or address of the video or image.
        num_frames: F, at least 1; a shorter clip gives fewer frames.
        height: Maximum height in pixels; the width is at most `MAX_WIDTH`, and small frames are not enlarged.
    """
    from vlmcap.config import DataConfig
    from vlmcap.data.decoding.video import VideoError, read_frames

    if not video:
        return ClipFrames(reason="the predictions name no video")
    try:
        frames = read_frames(video, DataConfig(num_frames=num_frames, decode_timeout_s=_TIMEOUT_S))
    except (VideoError, UserError, OSError) as error:
        return ClipFrames(reason=str(error))
    pixels = frames.permute(0, 2, 3, 1).contiguous().numpy()  # (F, 3, H, W) -> (F, H, W, 3)
    return ClipFrames(tuple(base64.b64encode(_as_jpeg(frame, height)).decode() for frame in pixels))


def read_all_frames(
    clips: Sequence[ClipRow],
    *,
    num_frames: int = NUM_FRAMES,
    height: int = HEIGHT,
    max_clips: int = MAX_CLIPS,
    max_bytes: int = MAX_BYTES,
    max_s: float = math.inf,
    advance: Callable[[], object] = lambda: None,
) -> dict[str, ClipFrames]:
    """Reads the frames of a report's clips within the limits of a page, by clip id.

    Args:
        clips: Clips, most important first.
        num_frames: Frames per clip, as in `read_clip_frames`.
        height: Maximum height of a frame in pixels.
        max_clips: Number of clips that get frames.
        max_bytes: Size of all frames together, after which clips get none.
        max_s: Seconds of reading, after which clips get none.
        advance: Callback called once per clip, for a progress bar.
    """
    pictures, total, started = {}, 0, time.monotonic()
    for index, clip in enumerate(clips):
        # Clips after the limits are named without frames.
        has_room = index < max_clips and total < max_bytes and time.monotonic() - started < max_s
        frames = read_clip_frames(clip.video, num_frames, height) if has_room else ClipFrames(reason=FULL)
        total += sum(map(len, frames.frames))
        pictures[clip.id] = frames
        advance()
    return pictures


def _as_jpeg(pixels: Any, height: int) -> bytes:
    """Encodes a frame, uint8 (H, W, 3), as a small JPEG file."""
    from PIL import Image

    picture = Image.fromarray(pixels)
    picture.thumbnail((MAX_WIDTH, height), Image.Resampling.LANCZOS)
    content = b""
    for quality in _QUALITIES:
        file = BytesIO()
        picture.save(file, "JPEG", quality=quality, optimize=True)
        content = file.getvalue()
        if len(content) <= _MAX_FRAME_BYTES:
            break
    return content
