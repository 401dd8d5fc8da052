"""Readers of data sets, one module per format, which is imported when it is first used."""

from __future__ import annotations

from importlib import import_module

from vlmcap.config import DataConfig
from vlmcap.config.kinds import maker_of
from vlmcap.data.formats.record import Entries, Reader, Record
from vlmcap.errors import UserError, first_line

__all__ = ["FORMATS", "Reader", "Record", "read_records"]

FORMATS = ("aihub", "jsonl", "coco_ko", "nikl", "msrvtt", "vatex", "llava", "webdataset")


def read_records(settings: DataConfig, split: str | None = None) -> Entries:
    """Yields the entries of a data set lazily and in a stable order: a `Record`, or a `Skipped` with the reason.

    Args:
        settings: Data configuration, whose class is that of a format.
        split: Split to read, so that others may be left out; None for all.

    Raises:
        UserError: The format has no reader, or the data set cannot be read at all.
    """
    name = "aihub" if settings.is_demo else settings.kind
    if plugin_reader := maker_of("data", name):
        return _plugin_entries(plugin_reader, settings, split)
    if name not in FORMATS:
        raise UserError(f"data.kind={name} has no reader; choose one of {', '.join(FORMATS)}")
    reader: Reader = getattr(import_module(f"vlmcap.data.formats.{name}"), f"read_{name}")
    return reader(settings, split)


def _plugin_entries(reader: Reader, settings: DataConfig, split: str | None) -> Entries:
    """Yields the entries of a user's own reader, and report its exceptions in one sentence."""
    try:
        yield from reader(settings, split)
    except UserError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(
            f"the reader of data={settings.kind} failed ({reason}); check data.root={settings.root}, or fix the reader"
        ) from error
