"""The clips of a configuration: read in any format, put into splits, kept in tables."""

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

_MAX_BAD_START = 10_000  # entries, all of them bad, after which the rest is not read
_REPORT_EVERY = 1_000  # entries
_QUIET_S = 2.0  # shorter reading is not worth a line
_MAX_SPLITS_NAMED = 20


class Splits(Mapping[str, ClipTable]):
    """Split name to its clips, in the order train, val, test.

    Args:
        tables: The clips.
        skipped: Entries of the data set that cannot be used, of these splits as far as that is known.
        note: A sentence on captions that were left out of the lists of clips, "" where none were.
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
    """The clips of splits, all read in one pass.

    Of train `data.max_clips`, of the others `evaluation.max_final_clips` at most.

    Args:
        config: `data`, `evaluation`, `seed` and `paths.cache_dir`, in which the tables are kept, are read.
        splits: What must be there.
        optional: What may be missing, and is left out then.

    Raises:
        UserError: The data set cannot be read, a split is missing, nothing of it can be used, or two clips of a split
            have one id.
    """
    use_index_folder(Path(config.paths.cache_dir) / "archives")
    wanted = [split for split in Split if split in splits or split in optional]
    drawer = _drawer(config)
    only = wanted[0].value if len(wanted) == 1 and drawer is None else None
    entries = read_records(config.data, only)
    with ExitStack() as stack:
        folder = Path(config.paths.cache_dir) / "manifests"
        writers = {split.value: stack.enter_context(TableWriter(folder)) for split in wanted}
        reading = _Reading(config, writers, drawer)
        reading.read(_with_progress(entries))
        reading.check([split.value for split in splits])
        tables = {name: _cut(config, name, writer.close()) for name, writer in writers.items() if len(writer)}
    return Splits(tables, reading.skipped, reading.note)


def _cut(config: Config, split: str, table: ClipTable) -> ClipTable:
    """A split with no more clips than are asked for: of train a seeded choice, of the others the first ones."""
    count = config.data.max_clips if split == "train" else config.evaluation.max_final_clips
    if count is None or count >= len(table):
        return table
    return table.select(nested_subset(len(table), count, config.seed) if split == "train" else np.arange(count))


def open_skipped_log(config: Config, clips: Mapping[str, Sequence[Clip]]) -> SkippedClipLog:
    """The run's skipped_log of bad clips, in which the bad entries of the data set stand.

    Raises:
        UserError: They are more than `data.max_bad_fraction`.
    """
    skipped = clips.skipped if isinstance(clips, Splits) else ()
    num_clips = sum(map(len, clips.values())) + len(skipped)
    skipped_log = SkippedClipLog(
        Path(config.paths.output_dir) / "skipped_clips.jsonl", config.data.max_bad_fraction, num_clips
    )
    skipped_log.add_all(skipped)
    skipped_log.check()
    return skipped_log


class _Reading:
    """Puts the entries of a data set into the tables of their splits, and keeps what is bad."""

    def __init__(self, config: Config, writers: Mapping[str, TableWriter], drawer: SplitDrawer | None) -> None:
        self.config, self.writers, self.drawer = config, writers, drawer
        self.skipped: list[Skipped] = []
        self.num_clips: Counter[str] = Counter()  # by split, wanted or not
        self._num_empty, self._first_empty = 0, ""

    def read(self, entries: Iterable[Record | Skipped]) -> None:
        for number, entry in enumerate(entries, 1):
            self._add(entry)
            if number == _MAX_BAD_START and not self.num_clips:
                raise self._all_bad(f"the first {number}")
        if self.drawer is not None:
            self.drawer.check()

    @property
    def note(self) -> str:
        """A sentence on captions that were left out."""
        if not self._num_empty:
            return ""
        return f"{self._num_empty} captions are null, empty or no text and were left out of their clips' lists; first {self._first_empty}"

    def check(self, required: Sequence[str]) -> None:
        """`UserError` if a required split has no clip."""
        missing = [name for name in required if not len(self.writers[name])]
        if not missing and self.num_clips:
            return
        root = self.config.data.root
        if not self.num_clips:
            raise (
                self._all_bad(f"the {len(self.skipped)}")
                if self.skipped
                else UserError(f"data.root={root} has no clips; set data.root")
            )
        if not missing:
            return
        there = ", ".join(f"{name}: {count}" for name, count in self.num_clips.most_common(_MAX_SPLITS_NAMED))
        bad = f"; {len(self.skipped)} entries cannot be used, first: {_told(self.skipped[0])}" if self.skipped else ""
        mend = (
            "raise data.splits.val or data.splits.test, or change data.splits.seed"
            if self.drawer is not None
            else "train and val are needed to train and test is optional; add what is missing, or set "
            "data.splits.random=true, "
            "which draws all three"
        )
        raise UserError(
            f"data.root={root} has no clips of the split {' and '.join(missing)} (clips there, {there}){bad}: {mend}"
        )

    def _add(self, entry: Record | Skipped) -> None:
        split = self._split_of(entry)
        if isinstance(entry, Record) and not split:
            entry = skip(entry.clip.id, _NO_SPLIT, entry.clip.video)
        if isinstance(entry, Record) and split in self.writers:
            try:
                self.writers[split].add(entry.clip)
                self._num_empty += entry.num_empty
                self._first_empty = self._first_empty or (entry.clip.id if entry.num_empty else "")
            except UnicodeEncodeError:
                entry = skip(
                    entry.clip.id,
                    "it holds text that is no Unicode (half of a surrogate pair): repair it",
                    entry.clip.video,
                )
        if isinstance(entry, Record):
            self.num_clips[split] += 1
        elif not split or split in self.writers:
            self.skipped.append(entry)

    def _split_of(self, entry: Record | Skipped) -> str:
        if self.drawer is not None:
            return self.drawer.split_of(entry if isinstance(entry, Record) else Record(entry.clip))
        return standard_split(entry.split) if isinstance(entry, Record) else ""

    def _all_bad(self, which: str) -> UserError:
        root = self.config.data.root
        return UserError(f"none of {which} entries of data.root={root} can be used; first: {_told(self.skipped[0])}")


_NO_SPLIT = "it names no split: set data.splits.random=true, which draws splits, or say of each clip which one it is in"


def _told(skipped: Skipped) -> str:
    return f"{skipped.clip.id} ({skipped.reason})"


def _drawer(config: Config) -> SplitDrawer | None:
    return SplitDrawer(config.data.splits, config.data.root) if config.data.splits.random else None


def _with_progress(entries: Entries) -> Iterator[Record | Skipped]:
    from vlmcap.terminal import progress_reporter

    with progress_reporter("reading the annotations", quiet_s=_QUIET_S) as report:
        number = 0
        for number, entry in enumerate(entries, 1):
            if number % _REPORT_EVERY == 0:
                report(number, None)  # how many there are is known at the end
            yield entry
        report(number, number)


def blank_clip(config: Config) -> Clip:
    """A clip of `data.num_frames` black pictures, whose file is made on first use.

    A clip like any other, so that its features are cached where those of others are, and frames go through the encoder
    where theirs do.
    """
    from PIL import Image

    file = Path(config.paths.cache_dir) / "black.png"
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as partial:
            Image.new("RGB", (_SIDE, _SIDE)).save(partial, format="PNG")
    return Clip("black", str(file), (), frames=(str(file),) * config.data.num_frames)


def with_blank(config: Config, clips: Mapping[str, Sequence[Clip]]) -> Mapping[str, Sequence[Clip]]:
    """Clips whose features a run needs: with the black one where it is asked for."""
    return {**clips, "black": [blank_clip(config)]} if config.callbacks.visual_reliance.enabled else clips


_SIDE = 448  # pixels; black stays black at any other size
