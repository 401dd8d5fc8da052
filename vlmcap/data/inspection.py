"""Inspection of a data set before training: broken files, captions that are too long, duplicate clips.

Legend: N clips, F frames, H/W pixels.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from vlmcap.data.duplicates import NUM_HASHED_FRAMES, look_alikes, picture_hash
from vlmcap.types import Clip, Sample, Skipped

THUMBNAIL_HEIGHT = 90


@dataclass(frozen=True)
class Thumbnails:
    """Scales frames, uint8 (F, 3, H, W), down to a height; smaller frames are left as they are."""

    height: int = THUMBNAIL_HEIGHT

    def __call__(self, frames: Tensor) -> Tensor:
        """Returns the frames at that height with their aspect ratio."""
        height, width = frames.shape[-2:]
        if height <= self.height:
            return frames
        size = (self.height, max(1, round(width * self.height / height)))
        return F.interpolate(frames.float(), size, mode="area").round().to(torch.uint8)


@dataclass(frozen=True, slots=True)
class Entry:
    """A clip, identified by its split and id."""

    split: str
    id: str
    video: str


@dataclass(frozen=True, slots=True)
class Broken:
    """A clip or label that cannot be used."""

    entry: Entry
    reason: str


@dataclass(slots=True)
class SplitReport:
    """Statistics of the captions of one split.

    Attributes:
        num_clips: Number of clips, N.
        num_captions: Number of captions of all clips.
        characters: (N,) length of each clip's first caption in characters.
        tokens: (N,) the same in tokens of the language model, end token included; None if no tokenizer was given.
    """

    num_clips: int
    num_captions: int
    characters: NDArray[np.int64]
    tokens: NDArray[np.int32] | None = None


@dataclass
class Inspection:
    """Everything that an inspection found.

    Attributes:
        splits: Split name to statistics.
        broken: Labels and videos that cannot be used.
        same_captions: Captions shared by several clips, with those clips; the most frequent first.
        look_alikes: Groups of clips that look alike.
        samples: Some clips with their thumbnails, uint8 (F, 3, H, W).
        num_decoded: Number of clips whose video was read.
    """

    splits: dict[str, SplitReport] = field(default_factory=dict)
    broken: list[Broken] = field(default_factory=list)
    same_captions: list[tuple[str, list[Entry]]] = field(default_factory=list)
    look_alikes: list[list[Entry]] = field(default_factory=list)
    samples: list[tuple[Entry, Clip, Tensor]] = field(default_factory=list)
    num_decoded: int = 0

    @property
    def leaks(self) -> list[list[Entry]]:
        """Groups of clips that look alike and are in different splits."""
        return [group for group in self.look_alikes if len({entry.split for entry in group}) > 1]


def read_captions(clips: Sequence[Clip]) -> SplitReport:
    """Returns the caption lengths of a split."""
    counts = np.array(
        [(len(clip.captions), len(clip.captions[0]) if clip.captions else 0) for clip in clips], dtype=np.int64
    )
    # An empty list would have no second axis.
    counts = counts.reshape(-1, 2)
    return SplitReport(len(counts), int(counts[:, 0].sum()), counts[:, 1])


def repeated_captions(splits: Mapping[str, Sequence[Clip]]) -> list[tuple[str, list[Entry]]]:
    """Returns the captions that more than one clip has, with those clips; the most frequent first."""
    # Hashes first, so that a million captions of 575 characters are not held in memory.
    positions: dict[int, list[tuple[str, int]]] = defaultdict(list)
    for split, clips in splits.items():
        for index, clip in enumerate(clips):
            for caption in set(clip.captions):
                positions[hash(caption)].append((split, index))
    entries: dict[str, list[Entry]] = defaultdict(list)
    for key, same in positions.items():
        for split, index in same if len(same) > 1 else ():
            clip = splits[split][index]
            for caption in {caption for caption in clip.captions if hash(caption) == key}:
                entries[caption].append(Entry(split, clip.id, clip.video))
    # Texts are compared again here, as different captions may have the same hash.
    return sorted(((text, same) for text, same in entries.items() if len(same) > 1), key=lambda item: -len(item[1]))


def read_videos(
    report: Inspection, items: Iterable[tuple[str, Sample | Skipped]], *, chosen: Sequence[int] = ()
) -> Iterator[int]:
    """Adds what the videos show to a report, and yields the number of finished clips after each.

    Args:
        report: Report whose `broken`, `samples`, `num_decoded` and, at the end, `look_alikes` are filled.
        items: Split and sample of each clip, decoded by `Thumbnails`, at most three frames per clip.
        chosen: Positions in `items` of the clips to show as samples.
    """
    wanted, entries, hashes = set(chosen), [], []
    for position, (split, item) in enumerate(items):
        entry = Entry(split, item.clip.id, item.clip.video)
        if isinstance(item, Skipped):
            report.broken.append(Broken(entry, item.reason))
        else:
            assert item.frames is not None
            numbers = picture_hash(item.frames)
            entries.append(entry)
            hashes.append(np.resize(numbers, NUM_HASHED_FRAMES))  # an image repeats its only frame
            report.num_decoded += 1
            if position in wanted:
                report.samples.append((entry, item.clip, item.frames))
        yield position + 1
    if hashes:
        report.look_alikes = [[entries[index] for index in group] for group in look_alikes(np.stack(hashes))]


def as_jpeg(frame: Tensor) -> bytes:
    """Encodes a frame, uint8 (3, H, W), as a JPEG file."""
    file = BytesIO()
    # (3, H, W) -> (H, W, 3)
    Image.fromarray(frame.permute(1, 2, 0).contiguous().numpy()).save(file, "JPEG", quality=80)
    return file.getvalue()
