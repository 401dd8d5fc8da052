"""Split names as data sets write them, and splits drawn by groups of clips."""

from __future__ import annotations

import hashlib
import random
import re
import unicodedata

import numpy as np
from numpy.typing import NDArray

from vlmcap.config import SplitConfig
from vlmcap.data.formats.record import Record
from vlmcap.data.media.roots import real_address, relative_address
from vlmcap.errors import UserError
from vlmcap.types import Clip

SPLITS = ("train", "val", "test")
SPELLINGS = {
    "train": ("train", "training", "훈련", "학습"),
    "val": ("val", "validation", "validate", "valid", "dev", "검증"),
    "test": ("test", "testing", "시험", "평가", "테스트"),
}
"""Names that data sets use for the splits."""
KOREAN_ENDING = r"(?:용|[\s_-]*(?:데이터|자료)(?:[\s_-]*(?:셋|세트))?|[\s_-]*(?:셋|세트))*"
"""Endings of a Korean split name: 훈련용, 검증데이터, 시험 데이터셋."""

_STANDARD = {spelling: split for split, spellings in SPELLINGS.items() for spelling in spellings}
_BEFORE = re.compile(r"(?:\[[^\]]*\]\s*)?(?:\d+\s*[._-]\s*)?")
_KOREAN = re.compile(rf"([가-힣]+?){KOREAN_ENDING}")


def standard_split(name: str) -> str:
    """Returns `train`, `val` or `test` for the many spellings of them (`Training`, `2.Validation`, `훈련`).

    Other names are returned in lower case.
    """
    name = _BEFORE.sub("", unicodedata.normalize("NFC", name).strip().lower(), count=1)
    korean = _KOREAN.fullmatch(name)
    return _STANDARD.get(korean[1] if korean else name, name)


def split_in_path(path: str) -> tuple[str, str]:
    """Returns the split that the first such folder of a path names, "" if none does, and the path without it."""
    *folders, name = path.split("/")
    for index, folder in enumerate(folders):
        split = standard_split(folder)
        if split in SPLITS:
            return split, "/".join([*folders[:index], *folders[index + 1 :], name])
    return "", path


class SplitDrawer:
    """Draws the split of a clip from its group alone.

    So a group is never in two splits, and a data set that grows keeps its old splits. The group is what the pattern
    finds in the id, else the group that the data set names, else the video itself, by its path below the root.

    Args:
        settings: Shares, seed and pattern.
        root: Root folder or address of the data set.

    Raises:
        UserError: The pattern is not a regular expression, or has no group in parentheses.
    """

    def __init__(self, settings: SplitConfig, root: str) -> None:
        self.settings, self.root = settings, root
        self._pattern = None if settings.group_pattern is None else _compile(settings.group_pattern)
        self._num_matches = 0
        self._unmatched: str | None = None

    def split_of(self, record: Record) -> str:
        """Returns the split of a clip."""
        return draw_split(self.group_of(record), self.settings)

    def group_of(self, record: Record) -> str:
        """Returns the name of the source that a clip comes from."""
        clip = record.clip
        if self._pattern is not None:
            match = self._pattern.search(clip.id)
            if match is not None and match[1]:
                self._num_matches += 1
                return match[1]
            self._unmatched = self._unmatched or clip.id
        return record.group or video_name(clip, self.root)

    def check(self) -> None:
        """Checks the pattern after all clips have been drawn.

        Raises:
            UserError: The pattern matched no id.
        """
        if self._unmatched is not None and not self._num_matches:
            raise UserError(
                f"data.splits.group_pattern={self.settings.group_pattern} matches no id, such as "
                f"'{self._unmatched}'; fix it, or set it "
                "to null, which keeps the clips of one video file together"
            )


def draw_split(group: str, settings: SplitConfig) -> str:
    """Draws the split of a group by a hash of its name and the seed.

    Test takes one end of the range of hashes and validation the other, so that changing one share leaves the other
    split unchanged.
    """
    digest = hashlib.sha256(f"{settings.seed}\0{group}".encode("utf-8", "surrogatepass")).digest()
    # 64 bits of the hash as a number in [0, 1).
    position = int.from_bytes(digest[:8]) / 2**64
    return "test" if position < settings.test else "val" if position >= 1 - settings.val else "train"


def video_name(clip: Clip, root: str) -> str:
    """Returns the source of a clip for which the data set names none: the resolved path of its video, or its id."""
    return relative_address(real_address(clip.video), real_address(root)) if clip.video else clip.id


def nested_subset(num_clips: int, max_clips: int, seed: int) -> NDArray[np.int64]:
    """Returns `max_clips` sorted positions; with the same seed, a smaller subset is contained in a larger one."""
    # One order of all clips for every size, of which a subset takes the first ones.
    order = random.Random(seed).sample(range(num_clips), num_clips)
    return np.sort(np.array(order[:max_clips], np.int64))


def _compile(pattern: str) -> re.Pattern[str]:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise UserError(
            f"data.splits.group_pattern={pattern} is not a regular expression ({error}); fix it, or set it to null"
        ) from error
    if not compiled.groups:
        raise UserError(
            f"data.splits.group_pattern={pattern} has no group; put the section of the id that names the source in "
            "parentheses"
        )
    return compiled
