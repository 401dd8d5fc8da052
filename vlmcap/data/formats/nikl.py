"""Image captions of the National Institute of Korean Language.

The files are JSON Lines of `id`, `input` (the image) and `output` (five captions).
"""

from __future__ import annotations

from typing import Any

from vlmcap.config import NiklConfig
from vlmcap.data.formats.annotations import annotation_sources, checked, json_lines, make_record, media_name, name_at
from vlmcap.data.formats.keys import captions_at, text_at
from vlmcap.data.formats.record import Entries, Record, skip
from vlmcap.types import Skipped


def read_nikl(settings: NiklConfig, split: str | None = None) -> Entries:
    """Yields a record for each line; the split is that of the file if `data.annotations` has `{split}`.

    `input` names the image: a file below `data.root/data.media` if it has an ending, else the `{id}` of
    `data.media_pattern`.

    Raises:
        UserError: A file cannot be read, or no line can be used.
    """
    return checked(_entries(settings, split), settings)


def _entries(settings: NiklConfig, split: str | None) -> Entries:
    for name, address in annotation_sources(settings, split):
        for number, entry in json_lines(address):
            yield entry if isinstance(entry, Skipped) else _record(settings, entry, number, name)


def _record(settings: NiklConfig, entry: Any, number: int, split: str) -> Record | Skipped:
    image = name_at(entry, "input")
    id = text_at(entry, "id") or image or f"line {number}"
    if not image:
        return skip(id, "the line has no input, which names the image")
    has_ending = "." in image.rpartition("/")[2]
    file = image if has_ending else media_name(settings, image)
    return make_record(settings, id, [file], captions_at(entry, settings.caption_key), entry, split=split)
