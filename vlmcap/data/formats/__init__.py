"""Readers of data sets, a module a format; each is imported when it is first used."""

from __future__ import annotations

from importlib import import_module

from vlmcap.config import DataConfig
from vlmcap.config.kinds import maker_of
from vlmcap.data.formats.record import Entries, Reader, Record
from vlmcap.errors import UserError, first_line

__all__ = ["FORMATS", "Reader", "Record", "read_records"]

FORMATS = ("aihub", "jsonl", "coco_ko", "nikl", "msrvtt", "vatex", "llava", "webdataset")


def read_records(settings: DataConfig, split: str | None = None) -> Entries:
    """The entries of a data set, lazily and in a stable order.

    A `Record` each, or a `Skipped` that says why there is none.

    Args:
        settings: Where the data set is and how it is read; its class is that of a format.
        split: The one split that is wanted, which may save reading the others; None for all.

    Raises:
        UserError: There is no reader of the format, or the data set cannot be read at all.
    """
    name = "aihub" if settings.is_demo else settings.kind
    if own := maker_of("data", name):
        return _plugin_entries(own, settings, split)
    if name not in FORMATS:
        raise UserError(f"data.kind={name} has no reader; choose one of {', '.join(FORMATS)}")
    reader: Reader = getattr(import_module(f"vlmcap.data.formats.{name}"), f"read_{name}")
    return reader(settings, split)


def _plugin_entries(reader: Reader, settings: DataConfig, split: str | None) -> Entries:
    """The entries that a user's own reader gives; whatever it raises is said in one sentence."""
    try:
        yield from reader(settings, split)
    except UserError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(
            f"the reader of data={settings.kind} failed ({reason}); check data.root={settings.root}, or correct it"
        ) from error
