"""The page of a report: one HTML file that needs nothing else, in English and Korean, light and dark.

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
from vlmcap.reporting.report.data import ClipRow, Report

SCRIPTS = ("words.js", "dom.js", "leaderboard.js", "charts.js", "clips.js", "run.js", "main.js")
MAX_POINTS = 240  # of a curve; more cannot be told apart on a screen
_DIGITS = 6

_LABELS = METRIC_LABELS | {"loss": "Loss"}
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


def report_page(report: Report, pictures: Mapping[str, Pictures] | None = None) -> str:
    """The whole page.

    Whatever the report holds is data to it: the page's own code makes text of it, and the browser is told to run and to
    fetch nothing else.

    Args:
        report: What it shows.
        pictures: By clip id, for clips without `thumbnails` of their own: frames, or why there are none.
    """
    style, script = _part("page.css"), "".join(_part(name) for name in SCRIPTS)
    data = _embedded(page_data(report, pictures or {}))
    policy = f"default-src 'none'; img-src data:; style-src {_hash(style)}; script-src {_hash(script)}; base-uri 'none'; form-action 'none'"
    return (
        f'<!doctype html>\n<html lang="en" data-theme="light"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(policy)}">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{escape(report.title)}</title>'
        f'<link rel="icon" href="data:,"><style>{style}</style></head>\n<body><div id="bar"></div><main id="page">'
        f"<h1>{escape(report.title)}</h1><noscript>This page needs JavaScript. 이 페이지는 JavaScript가 "
        "필요합니다.</noscript></main>\n"
        f'<script type="application/json" id="data">{data}</script>\n<script>{script}</script></body></html>\n'
    )


def page_data(report: Report, pictures: Mapping[str, Pictures]) -> dict[str, Any]:
    """What the page embeds: the report as plain data, made small, with labels and pictures."""
    plain = report.plain()
    common = _common_config([run["config"] for run in plain["runs"]])
    for run in plain["runs"]:
        run["config"] = {key: value for key, value in run["config"].items() if key not in common}
        run["curve"] = {name: _thinned(points) for name, points in run["curve"].items()}
    for clip in plain["clips"]:
        found = pictures.get(clip["id"])
        clip["thumbnails"] = clip["thumbnails"] or ([] if found is None else list(found.frames))
        clip["picture_note"] = "" if found is None else found.reason
    small: dict[str, Any] = _rounded(plain | {"common_config": common, "labels": _LABELS})
    return small


def _part(name: str) -> str:
    return (files("vlmcap.reporting.report") / "web" / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """How a content security policy names the one script or style that may act."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _embedded(data: Any) -> str:
    """JSON that cannot end the element it stands in, whatever texts it holds."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return (
        text.replace("<", "\\u003c")
        .replace(">", "\\u003e")
        .replace("&", "\\u0026")
        .replace("\u2028", "\\u2028")
        .replace("\u2029", "\\u2029")
    )


def _common_config(configs: list[dict[str, Any]]) -> dict[str, Any]:
    """Keys with one value in all configurations that there are: written once, they halve a page of many runs."""
    known = [config for config in configs if config]
    if len(known) < 2:
        return {}
    return {
        key: value
        for key, value in known[0].items()
        if all(key in config and config[key] == value for config in known[1:])
    }


def _thinned(points: list[Any]) -> list[Any]:
    if len(points) <= MAX_POINTS:
        return points
    return [points[round(index * (len(points) - 1) / (MAX_POINTS - 1))] for index in range(MAX_POINTS)]


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list | tuple) else value


def clip_pictures(video: str, num_frames: int = NUM_FRAMES, height: int = HEIGHT) -> Pictures:
    """Frames at the centres of equal parts of a clip.

    A file that is missing or cannot be read is told in `reason`: a report is written of runs whose videos may lie
    elsewhere.

    Args:
        video: Path or address of the video or image.
        num_frames: F, at least 1; a shorter clip has fewer.
        height: In pixels; smaller pictures stay as they are, wide ones are at most `MAX_WIDTH` wide.
    """
    from vlmcap.config import DataConfig
    from vlmcap.data.decoding.video import VideoError, read_frames

    if not video:
        return Pictures(reason="the predictions name no video")
    try:
        frames = read_frames(video, DataConfig(num_frames=num_frames, decode_timeout_s=_TIMEOUT_S))
    except (VideoError, UserError, OSError) as error:
        return Pictures(reason=str(error))
    pixels = frames.permute(0, 2, 3, 1).contiguous().numpy()
    return Pictures(tuple(base64.b64encode(_as_jpeg(picture, height)).decode() for picture in pixels))


def pictures_of(
    clips: Sequence[ClipRow],
    *,
    num_frames: int = NUM_FRAMES,
    height: int = HEIGHT,
    max_clips: int = MAX_CLIPS,
    max_bytes: int = MAX_BYTES,
    max_s: float = math.inf,
    advance: Callable[[], object] = lambda: None,
) -> dict[str, Pictures]:
    """Frames of the clips of a report, by clip id, within a bound that a page can carry.

    Args:
        clips: The first ones matter most.
        num_frames: Of each clip, as in `clip_pictures`.
        height: In pixels.
        max_clips: Clips that get pictures.
        max_bytes: All pictures together; the clips after it get none.
        max_s: Seconds for reading; the clips after it get none.
        advance: Called once a clip.
    """
    found, total, started = {}, 0, time.monotonic()
    for index, clip in enumerate(clips):
        is_room = index < max_clips and total < max_bytes and time.monotonic() - started < max_s
        pictures = clip_pictures(clip.video, num_frames, height) if is_room else Pictures(reason=FULL)
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
