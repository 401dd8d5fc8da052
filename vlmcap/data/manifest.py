"""Tables of clips in files, so that memory does not grow with the number of clips.

Legend: N clips in a table.
"""

from __future__ import annotations

import hashlib
import json
import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self, overload

import numpy as np
from numpy.typing import NDArray

from vlmcap.errors import UserError
from vlmcap.files import work_folder
from vlmcap.types import Clip

Rows = range | NDArray[np.int64]

_ENCODE = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


class ClipTable(Sequence[Clip]):
    """Clips in a JSON-lines file, read one at a time by their position in it.

    Copies, slices and workers share the file.

    Lines are read at their offset (`pread`) and not through a memory map, whose pages would count as memory of each
    worker that touches them; the table of offsets, 8 bytes per clip, is mapped.

    Args:
        path: The `.jsonl` file, with its `.offsets.npy` file next to it.
        rows: Positions in the file, in the order of the table; None for all.
    """

    def __init__(self, path: Path, rows: Rows | None = None) -> None:
        self.path = path
        self._file: BinaryIO | None = None
        self._process = 0
        self._offsets: NDArray[np.int64] | None = None
        self._rows: Rows = range(len(self._line_offsets()) - 1) if rows is None else rows

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Clip: ...
    @overload
    def __getitem__(self, index: slice) -> ClipTable: ...
    def __getitem__(self, index: int | slice) -> Clip | ClipTable:
        if isinstance(index, slice):
            return ClipTable(self.path, self._rows[index])
        return self._read(int(self._rows[index]))

    def __iter__(self) -> Iterator[Clip]:
        return (self._read(int(row)) for row in self._rows)

    def __reduce__(self) -> tuple[type[ClipTable], tuple[Path, Rows]]:
        return ClipTable, (self.path, self._rows)

    def __repr__(self) -> str:
        return f"ClipTable({str(self.path)!r}, {len(self)} clips)"

    def select(self, indices: NDArray[np.int64]) -> ClipTable:
        """Returns a table of the clips at `indices`, in that order; it takes 8 bytes per clip."""
        rows = self._rows
        if isinstance(rows, range):
            indices = np.asarray(indices, np.int64)
            if len(indices) and (indices.min() < 0 or indices.max() >= len(rows)):
                raise IndexError(f"indices must be from 0 to {len(rows) - 1}")
            return ClipTable(self.path, rows.start + rows.step * indices)
        return ClipTable(self.path, rows[indices])

    def _read(self, row: int) -> Clip:
        offsets = self._line_offsets()
        start, end = int(offsets[row]), int(offsets[row + 1])
        if self._file is None or self._process != os.getpid():  # a forked child must not use its parent's open file
            self._file, self._process = self.path.open("rb", buffering=0), os.getpid()
        # Reads at an offset without moving a shared position.
        content = json.loads(os.pread(self._file.fileno(), end - start, start))
        return Clip(
            content["id"],
            content["video"],
            tuple(content["captions"]),
            content.get("category", ""),
            tuple(content.get("frames", ())),
        )

    def _line_offsets(self) -> NDArray[np.int64]:
        if self._offsets is None:
            self._offsets = np.load(_offsets_path(self.path), mmap_mode="r", allow_pickle=False)
        return self._offsets


class TableWriter:
    """Writes clips to a table, which `close` names by its content; a context manager.

    Any number of processes may write to one folder: each works in a subfolder of its own, and equal tables get equal
    names.

    Args:
        folder: Folder of the tables; it is created.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._opened = ExitStack()
        self._partial = self._opened.enter_context(work_folder(folder / "table"))
        self._file: BinaryIO = (self._partial / "table.jsonl").open("wb")
        self._digest = hashlib.sha256()
        # 8 bytes per clip, where a list would take 32 and more.
        self._offsets, self._ids = array("q", [0]), array("q")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        self._opened.close()

    def __len__(self) -> int:
        return len(self._ids)

    def add(self, clip: Clip) -> None:
        """Appends a clip.

        Raises:
            UnicodeEncodeError: A text of the clip is not valid Unicode, such as half of a surrogate pair.
        """
        content: dict[str, Any] = {"id": clip.id, "video": clip.video, "captions": clip.captions}
        content |= {name: value for name in ("category", "frames") if (value := getattr(clip, name))}
        line = f"{_ENCODE(content)}\n".encode()
        self._file.write(line)
        self._digest.update(line)
        self._offsets.append(self._offsets[-1] + len(line))
        # Eight bytes instead of the id; equal ones are compared as text at the end.
        self._ids.append(hash(clip.id))

    def close(self) -> ClipTable:
        """Moves the table to its final name and returns it.

        Raises:
            UserError: Two clips have the same id.
        """
        self._file.close()
        np.save(self._partial / "table.npy", np.frombuffer(self._offsets, np.int64))
        (self._partial / "table.npy").rename(_offsets_path(self._partial / "table.jsonl"))
        _refuse_equal_ids(ClipTable(self._partial / "table.jsonl"), np.frombuffer(self._ids, np.int64))
        path = self.folder / f"{self._digest.hexdigest()[:16]}.jsonl"
        # The offsets come first, so that a table never exists without them.
        os.replace(_offsets_path(self._partial / "table.jsonl"), _offsets_path(path))
        os.replace(self._partial / "table.jsonl", path)
        return ClipTable(path)


def write_table(clips: Iterable[Clip], folder: Path) -> ClipTable:
    """Writes the clips as a table in `folder`, named by its content.

    Raises:
        UserError: Two clips have the same id.
    """
    with TableWriter(folder) as writer:
        for clip in clips:
            writer.add(clip)
        return writer.close()


def _offsets_path(path: Path) -> Path:
    return path.with_suffix(".offsets.npy")


def _refuse_equal_ids(table: ClipTable, hashes: NDArray[np.int64]) -> None:
    order = np.argsort(hashes, kind="stable")
    equal = np.flatnonzero(hashes[order[1:]] == hashes[order[:-1]])
    for position in equal.tolist():
        first, second = table[int(order[position])], table[int(order[position + 1])]
        if first.id == second.id:  # equal hashes do not prove it
            raise UserError(
                f"two clips of one split have the id '{first.id}', {first.video} ('{first.captions[0][:40]}') and "
                f"{second.video} ('{second.captions[0][:40]}'); give each clip a unique id"
            )
