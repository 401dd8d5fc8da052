"""Reads the clips of a configuration in any format, splits them, and keeps them in tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vlmcap.config import Config, Split
from vlmcap.data.formats import Record, read_records
from vlmcap.data.formats.record import skip
from vlmcap.data.manifest import ClipTable, TableWriter
from vlmcap.data.media.archive_cache import use_index_folder
from vlmcap.data.skipped_clips import SkippedClipLog
from vlmcap.data.splits import SplitDrawer, nested_subset, standard_split
from vlmcap.errors import UserError
from vlmcap.files import replacing
from vlmcap.types import Clip, Skipped

if TYPE_CHECKING:
    from vlmcap.data.formats.record import Entries

_MAX_BAD_START = 10_000  # entries; if so many are bad from the start, the rest is not read
_REPORT_EVERY = 1_000  # entries
_SIDE = 448  # pixels; black stays black at any other size
_SILENT_S = 2.0  # shorter reading prints nothing
_MAX_SPLITS_NAMED = 20


class Splits(Mapping[str, ClipTable]):
    """Clips of each split, in the order train, val, test.

    Args:
        tables: Clips by split.
        skipped: Unusable entries of the data set, in these splits or without a known split.
        note: Sentence about captions that were left out, or "".
    """

    def __init__(self, tables: Mapping[str, ClipTable], skipped: Sequence[Skipped], note: str = "") -> None:
        self._tables = dict(tables)
        self.skipped = tuple(skipped)
        self.note = note

    def __getitem__(self, split: str) -> ClipTable:
        return self._tables[split]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tables)

    def __len__(self) -> int:
        return len(self._tables)


def load_splits(config: Config, splits: Sequence[Split], optional: Sequence[Split] = ()) -> Splits:
    """Loads the clips of several splits in one pass.

    The training split has at most `data.max_clips` clips, the others `evaluation.max_final_clips`.

    Args:
        config: Configuration, of which `data`, `evaluation`, `seed` and `paths.cache_dir` are read.
        splits: Required splits.
        optional: Splits that may be missing.

    Raises:
        UserError: The data set cannot be read, a required split is missing, no entry can be used, or two clips of a
            split have the same id.
    """
    # Members of large archives are indexed once, and every later run reads the index.
    use_index_folder(Path(config.paths.cache_dir) / "archives")
    wanted = [split for split in Split if split in splits or split in optional]
    drawer = SplitDrawer(config.data.splits, config.data.root) if config.data.splits.random else None
    # A reader may skip the files of other splits only if splits are not drawn and a single one is wanted.
    only = wanted[0].value if len(wanted) == 1 and drawer is None else None
    entries = read_records(config.data, only)
    with ExitStack() as stack:
        folder = Path(config.paths.cache_dir) / "manifests"
        # Clips go to tables on disk as they are read, so that a data set of any size takes little memory.
        writers = {split.value: stack.enter_context(TableWriter(folder)) for split in wanted}
        reading = _SplitReader(config, writers, drawer)
        reading.read(_with_progress(entries))
        reading.check([split.value for split in splits])
        tables = {name: _limit_clips(config, name, writer.close()) for name, writer in writers.items() if len(writer)}
    return Splits(tables, reading.skipped, reading.note)


def _limit_clips(config: Config, split: str, table: ClipTable) -> ClipTable:
    """Limits the number of clips: a seeded choice of the training split, the first clips of the others."""
    # The other splits keep their first clips, so that two runs score the same ones, whatever their seeds.
    count = config.data.max_clips if split == "train" else config.evaluation.max_final_clips
    if count is None or count >= len(table):
        return table
    return table.select(nested_subset(len(table), count, config.seed) if split == "train" else np.arange(count))


def open_skipped_log(config: Config, clips: Mapping[str, Sequence[Clip]]) -> SkippedClipLog:
    """Opens the log of skipped clips, which starts with the unusable entries of the data set.

    Raises:
        UserError: Their share is above `data.max_bad_fraction`.
    """
    skipped = clips.skipped if isinstance(clips, Splits) else ()
    num_clips = sum(map(len, clips.values())) + len(skipped)
    skipped_log = SkippedClipLog(
        Path(config.paths.output_dir) / "skipped_clips.jsonl", config.data.max_bad_fraction, num_clips
    )
    skipped_log.add_all(skipped)
    skipped_log.check()
    return skipped_log


class _SplitReader:
    """Writes the entries of a data set to the tables of their splits, and collects unusable ones."""

    def __init__(self, config: Config, writers: Mapping[str, TableWriter], drawer: SplitDrawer | None) -> None:
        self.config, self.writers, self.drawer = config, writers, drawer
        self.skipped: list[Skipped] = []
        # Counts tell the user which splits exist, if the wanted one is missing.
        self.num_clips: Counter[str] = Counter()  # by split, also of splits that are not loaded
        self._num_empty, self._first_empty = 0, ""

    def read(self, entries: Iterable[Record | Skipped]) -> None:
        for number, entry in enumerate(entries, 1):
            self._add(entry)
            # A wrong format or root makes every entry bad, and a data set of millions need not be read to say so.
            if number == _MAX_BAD_START and not self.num_clips:
                raise self._no_usable_entries(f"the first {number}")
        if self.drawer is not None:
            self.drawer.check()

    @property
    def note(self) -> str:
        """Sentence about captions that were left out, or ""."""
        if not self._num_empty:
            return ""
        return (
            f"{self._num_empty} captions are null, empty or not text, and were left out; the first is of the clip "
            f"{self._first_empty}"
        )

    def check(self, required: Sequence[str]) -> None:
        """Raises a `UserError` if a required split has no clip."""
        # 1. Every required split has a clip.
        missing = [name for name in required if not len(self.writers[name])]
        if not missing and self.num_clips:
            return
        root = self.config.data.root
        # 2. Nothing is usable at all: the first reason is the most helpful one.
        if not self.num_clips:
            raise (
                self._no_usable_entries(f"the {len(self.skipped)}")
                if self.skipped
                else UserError(f"data.root={root} has no clips; set data.root to the folder of the data set")
            )
        # 3. Some split is missing: name those that exist.
        there = ", ".join(f"{name}: {count}" for name, count in self.num_clips.most_common(_MAX_SPLITS_NAMED))
        bad = (
            f"; {len(self.skipped)} entries cannot be used, the first: {_describe_skipped(self.skipped[0])}"
            if self.skipped
            else ""
        )
        hint = (
            "raise data.splits.val or data.splits.test, or change data.splits.seed"
            if self.drawer is not None
            else "training needs train and val, and test is optional; add the missing clips, or set "
            "data.splits.random=true, which draws all three"
        )
        raise UserError(
            f"data.root={root} has no clips of the split {' and '.join(missing)} (it has {there}){bad}; {hint}"
        )

    def _add(self, entry: Record | Skipped) -> None:
        split = self._split_of(entry)
        # An entry without a split is unusable, unless splits are drawn.
        if isinstance(entry, Record) and not split:
            entry = skip(entry.clip.id, _NO_SPLIT, entry.clip.video)
        if isinstance(entry, Record) and split in self.writers:
            try:
                self.writers[split].add(entry.clip)
                self._num_empty += entry.num_empty
                self._first_empty = self._first_empty or (entry.clip.id if entry.num_empty else "")
            # Tables are UTF-8, which has no code for half of a surrogate pair; JSON labels can contain one as an
            # escape.
            except UnicodeEncodeError:
                entry = skip(
                    entry.clip.id,
                    "its text is not valid Unicode (half of a surrogate pair); repair it",
                    entry.clip.video,
                )
        if isinstance(entry, Record):
            self.num_clips[split] += 1
        # Skipped entries of splits that are not loaded are not reported.
        elif not split or split in self.writers:
            self.skipped.append(entry)

    def _split_of(self, entry: Record | Skipped) -> str:
        if self.drawer is not None:
            # A skipped entry is drawn like its clip would be, so that its split's share of bad clips is right.
            return self.drawer.split_of(entry if isinstance(entry, Record) else Record(entry.clip))
        return standard_split(entry.split) if isinstance(entry, Record) else ""

    def _no_usable_entries(self, which: str) -> UserError:
        root = self.config.data.root
        return UserError(
            f"none of {which} entries of data.root={root} can be used; the first: {_describe_skipped(self.skipped[0])}"
        )


_NO_SPLIT = "it has no split; set data.splits.random=true, which draws splits, or give each clip a split"


def _describe_skipped(skipped: Skipped) -> str:
    return f"{skipped.clip.id} ({skipped.reason})"


def _with_progress(entries: Entries) -> Iterator[Record | Skipped]:
    from vlmcap.terminal import progress_reporter

    with progress_reporter("reading the annotations", silent_s=_SILENT_S) as report:
        number = 0
        for number, entry in enumerate(entries, 1):
            if number % _REPORT_EVERY == 0:
                report(number, None)  # the total is known only at the end
            yield entry
        report(number, number)


def blank_clip(config: Config) -> Clip:
    """Returns a clip of `data.num_frames` black images, whose file is written on first use.

    It is treated like any other clip: its features are cached, or its frames are encoded.
    """
    from PIL import Image

    file = Path(config.paths.cache_dir) / "black.png"
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        # Runs that share a cache folder may write it at the same time.
        with replacing(file) as partial:
            Image.new("RGB", (_SIDE, _SIDE)).save(partial, format="PNG")
    return Clip("black", str(file), (), frames=(str(file),) * config.data.num_frames)


def with_blank(config: Config, clips: Mapping[str, Sequence[Clip]]) -> Mapping[str, Sequence[Clip]]:
    """Adds the black clip if visual reliance is measured, as its features are needed too."""
    return {**clips, "black": [blank_clip(config)]} if config.callbacks.visual_reliance.enabled else clips
