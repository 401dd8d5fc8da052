"""Readers of data sets, a module a format; each is imported when it is first used."""

from __future__ import annotations

from importlib import import_module

from vlmcap.data.formats.record import Entries, Reader, Record, SourceSettings
from vlmcap.errors import UserError

__all__ = ["FORMATS", "Reader", "Record", "SourceSettings", "read_records"]


def _reader(name: str) -> Reader:
    def read(settings: SourceSettings, split: str | None = None) -> Entries:
        module = import_module(f"vlmcap.data.formats.{name}")
        entries: Entries = getattr(module, f"read_{name}")(settings, split)
        return entries

    return read


FORMATS: dict[str, Reader] = {
    name: _reader(name) for name in ("aihub", "jsonl", "coco_ko", "nikl", "msrvtt", "vatex", "llava", "webdataset")
}


def read_records(format: str, settings: SourceSettings, split: str | None = None) -> Entries:
    """The entries of a data set, lazily and in a stable order: a `Record` each, or a `Skipped` that says why there is none.

    Args:
        format: A key of `FORMATS`.
        settings: Where the data set is and how it is read.
        split: The one split that is wanted, which may save reading the others; None for all.

    Raises:
        UserError: There is no such format, or the data set cannot be read at all.
    """
    if format not in FORMATS:
        raise UserError(f"data.format={format} is unknown; choose one of {', '.join(FORMATS)}")
    return FORMATS[format](settings, split)
