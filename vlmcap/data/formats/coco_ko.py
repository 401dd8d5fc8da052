"""COCO with Korean captions from AI Hub: a JSON list of `file_path`, `caption_ko` (a list) and `id`."""

from __future__ import annotations

import re
from typing import Any

from vlmcap.config import CocoKoConfig
from vlmcap.data.formats.annotations import checked, list_entries, make_record, name_at
from vlmcap.data.formats.keys import captions_at, text_at
from vlmcap.data.formats.record import Entries, Record, skip
from vlmcap.data.splits import split_in_path
from vlmcap.types import Skipped

# "train2014/x.jpg" -> "train/x.jpg"
_YEAR = re.compile(r"(?<=\w)20\d\d(?=/)")


def read_coco_ko(settings: CocoKoConfig, split: str | None = None) -> Entries:
    """Yields a record for each image with all its captions; the split is that of its folder (`train2014/`, `val2014/`).

    `file_path` is relative to `data.root/data.media`.

    Raises:
        UserError: The file is not such a list, or none of its entries can be used.
    """
    records = (_record(settings, entry, number, name) for name, number, entry in list_entries(settings, split))
    return checked(records, settings)


def _record(settings: CocoKoConfig, entry: Any, number: int, split: str) -> Record | Skipped:
    path = name_at(entry, "file_path")
    if not path:
        return skip(text_at(entry, "id") or f"entry {number}", "the entry has no file_path")
    id = text_at(entry, "id") or path.rpartition(".")[0]
    return make_record(
        settings,
        id,
        [path],
        captions_at(entry, settings.caption_key),
        entry,
        split=split or split_in_path(_YEAR.sub("", path))[0],
    )
