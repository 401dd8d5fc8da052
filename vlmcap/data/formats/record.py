"""The interface of all readers: records of clips, and skipped entries."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from vlmcap.types import Clip, Skipped


@dataclass(frozen=True, slots=True)
class Record:
    """A clip in a data set, before it belongs to a split.

    Attributes:
        clip: The clip.
        split: Name of its split, as written in the data set; "" if there is none.
        group: Name of the source, which must not be in two splits; "" for the video itself.
        num_empty: Number of captions left out because they are null, empty or not text.
    """

    clip: Clip
    split: str = ""
    group: str = ""
    num_empty: int = 0


Entries = Iterator[Record | Skipped]


class Reader(Protocol):
    """Yields the entries of a data set in a stable order, of one split if given; it may yield others too."""

    def __call__(self, settings: Any, split: str | None = None) -> Entries:
        """Yields the entries."""


def skip(name: str, reason: str, video: str = "") -> Skipped:
    """Builds a bad entry, with its name as text that any file can contain."""
    name, video, reason = (text.encode("utf-8", "backslashreplace").decode() for text in (name, video, reason))
    return Skipped(Clip(name, video, ()), reason)
