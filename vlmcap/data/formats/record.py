"""What every reader of a format takes and gives."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from vlmcap.types import Clip, Skipped


@dataclass(frozen=True, slots=True)
class Record:
    """A clip as a data set has it, before it belongs to a split.

    Attributes:
        clip: The clip.
        split: Name of its split, as the data set writes it; "" where it says nothing.
        group: Names the source that must not be in two splits; "" for the video itself.
        num_empty: Captions that were left out of its list, as they are null, empty or no text.
    """

    clip: Clip
    split: str = ""
    group: str = ""
    num_empty: int = 0


Entries = Iterator[Record | Skipped]


class Reader(Protocol):
    """Gives the entries of a data set in a stable order.

    Of one split where that is asked, though it may give others too.
    """

    def __call__(self, settings: Any, split: str | None = None) -> Entries:
        """The entries."""


def skip(name: str, reason: str, video: str = "") -> Skipped:
    """A bad entry, named as text that any file can hold."""
    name, video, reason = (text.encode("utf-8", "backslashreplace").decode() for text in (name, video, reason))
    return Skipped(Clip(name, video, ()), reason)
