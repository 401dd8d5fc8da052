"""VATEX: a JSON list of `videoID` and captions by language (`enCap`, `chCap`, and the key of a Korean translation)."""

from __future__ import annotations

import re
from typing import Any

from vlmcap.config import VatexConfig
from vlmcap.data.formats.annotations import checked, list_entries, make_record, media_name
from vlmcap.data.formats.keys import captions_at, text_at
from vlmcap.data.formats.record import Entries, Record, skip
from vlmcap.types import Skipped

_EXCERPT = re.compile(r"(.+)_\d{6}_\d{6}")  # a film's name, and the seconds at which the video starts and ends in it


def read_vatex(settings: VatexConfig, split: str | None = None) -> Entries:
    """Yields a record for each video with all captions of one language; the group is the film it was taken from.

    The split is that of the file, if `data.annotations` has `{split}`; the video is the `{id}` of `data.media_pattern`.

    Raises:
        UserError: A file is not such a list, or no entry can be used, for example because `data.caption_key` names a
            language that does not exist.
    """
    records = (_record(settings, entry, number, name) for name, number, entry in list_entries(settings, split))
    return checked(records, settings)


def _record(settings: VatexConfig, entry: Any, number: int, split: str) -> Record | Skipped:
    id = text_at(entry, "videoID")
    if not id:
        return skip(f"entry {number}", "the entry has no videoID")
    excerpt = _EXCERPT.fullmatch(id)
    group = excerpt[1] if excerpt else ""
    captions = captions_at(entry, settings.caption_key)
    return make_record(settings, id, [media_name(settings, id)], captions, entry, split=split, group=group)
