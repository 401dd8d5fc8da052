"""JSON Lines, one object per line: a video, an image or a list of frames, and its captions."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any, BinaryIO

from vlmcap.config import JsonlConfig
from vlmcap.data.formats.keys import captions_at, text_at, why_no_caption
from vlmcap.data.formats.record import Entries, Record, skip
from vlmcap.data.media import MediaError, open_media
from vlmcap.data.media.roots import OutsideRootError, annotation_files, resolve_media
from vlmcap.data.splits import SPLITS, standard_split
from vlmcap.types import Clip, Skipped

MAX_LINE_BYTES = 16 * 1024**2
_MEDIA_KEYS = ("video", "image", "frames")


class _BadLineError(Exception):
    """The reason why a line cannot be used; `video` is its address if known."""

    def __init__(self, reason: str, video: str = "") -> None:
        super().__init__(reason)
        self.video = video


def read_jsonl(settings: JsonlConfig, split: str | None = None) -> Entries:
    """Yields the clips of all lines in order, file by file, without blank lines.

    Keys of a line: one of `video`, `image` and `frames` (a list of images), paths below `root/media`; the caption at
    `caption_key`, a string or a list, or else `captions`; and, optionally, `id` (else the file's name and the number of
    the line among all), `split` (else the name of the .jsonl file, if that is a split), `category`, and `group`, which
    names the source.

    Args:
        settings: Configuration of the data set; `root`, `annotations`, `media`, `caption_key`, `category_key` and
            `allow_outside` are used.
        split: Split to read, without lines that name another one; None for all.

    Raises:
        UserError: There is no annotation file.
    """
    wanted = None if split is None else standard_split(split)
    number = 0  # counts lines of all files, so that ids made from it are unique
    for address in annotation_files(settings):
        # "zip://train.jsonl::file.zip" names its split by the member.
        name = standard_split(PurePosixPath(address.split("::")[0]).stem)
        file_split = name if name in SPLITS else ""
        try:
            with open_media(address) as file:
                for line_number, line in enumerate(_lines(file), 1):
                    number += 1
                    entry = _read_line(line, f"{address}:{line_number}", number, file_split, settings, wanted)
                    if entry is not None:
                        yield entry
        except MediaError as error:
            yield skip(address, str(error))


def _lines(file: BinaryIO) -> Iterator[bytes | None]:
    """Yields the lines without their ends; None for a line that is too long to hold in memory."""
    while line := file.readline(MAX_LINE_BYTES):
        # The last line may have no end.
        if line.endswith(b"\n") or len(line) < MAX_LINE_BYTES:
            yield line
            continue
        # Skip the rest of the long line.
        while rest := file.readline(MAX_LINE_BYTES):
            if rest.endswith(b"\n"):
                break
        yield None


def _read_line(
    line: bytes | None, location: str, number: int, file_split: str, settings: JsonlConfig, wanted: str | None
) -> Record | Skipped | None:
    """Returns the entry of a line, or None if it is blank or of another split."""
    # A byte order mark alone counts as blank.
    if line is not None and not line.strip(b" \t\r\n\xef\xbb\xbf"):
        return None
    content: Any = None
    try:
        content = _parse(line)
        split = text_at(content, "split") or file_split
        if wanted is not None and standard_split(split) not in ("", wanted):
            return None
        clip, num_empty = _clip(content, number, settings)
        return Record(clip, split, text_at(content, "group"), num_empty)
    except _BadLineError as error:
        # A broken line states no split, so it counts only if its file may be of the wanted one.
        if content is None and wanted is not None and file_split not in ("", wanted):
            return None
        given = text_at(content, "id") if isinstance(content, dict) else ""
        return skip(given or location, f"{location}: {error}", error.video)


def _parse(line: bytes | None) -> dict[str, Any]:
    if line is None:
        raise _BadLineError(f"the line has more than {MAX_LINE_BYTES} bytes; shorten or remove it")
    try:
        content = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise _BadLineError(
            f"the line is not UTF-8 text (byte {error.start}; cp949 and UTF-16 are not supported); convert the file"
        ) from error
    except (ValueError, RecursionError) as error:
        raise _BadLineError(f"the line is not JSON ({error}); repair or remove it") from error
    if not isinstance(content, dict):
        raise _BadLineError("the line is not a JSON object; write {…} with video, image or frames, and caption")
    return content


def _clip(content: dict[str, Any], number: int, settings: JsonlConfig) -> tuple[Clip, int]:
    """Returns the clip of a line, and the number of its captions that are empty."""
    names = _media_names(content)
    try:
        addresses = [resolve_media(settings, name) for name in names]
    except OutsideRootError as error:
        raise _BadLineError(str(error)) from error
    keys = (settings.caption_key, "captions")
    captions = next((at_key for key in keys if (at_key := captions_at(content, key)).texts), None)
    if captions is None:
        raise _BadLineError(
            f"there is no caption at data.caption_key={settings.caption_key} or "
            f"captions{why_no_caption(content, *keys)}; set data.caption_key, or repair or remove the line",
            addresses[0],
        )
    given = text_at(content, "id")
    if "id" in content and not given:
        raise _BadLineError("'id' is neither text nor a number; repair it or leave it out", addresses[0])
    # A file may have several lines, so its name alone is not enough.
    clip_id = given or f"{names[0]}:{number}"
    frames = tuple(addresses) if "frames" in content else ()
    category = text_at(content, settings.category_key or "category")
    return Clip(clip_id, addresses[0], captions.texts, category, frames), captions.num_empty


def _media_names(content: dict[str, Any]) -> list[str]:
    keys = [key for key in _MEDIA_KEYS if key in content]
    if len(keys) != 1:
        stated = " and ".join(keys) or f"none of them, but {', '.join(map(str, content))}"
        raise _BadLineError(f"a line must have one of video, image and frames, but this one has {stated}")
    value = content[keys[0]]
    names = value if keys[0] == "frames" else [value]
    if not isinstance(names, list) or not names or not all(isinstance(name, str) and name for name in names):
        raise _BadLineError(f"'{keys[0]}' must be {'a list of file names' if keys[0] == 'frames' else 'a file name'}")
    return names
