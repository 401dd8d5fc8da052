"""Reads the file that `wandb sync` would upload: W&B's own records out of LevelDB's log format."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BLOCK = 32768


def chunks(content: bytes) -> Iterator[bytes]:
    """Yields whole records: 32 KiB blocks after a 7-byte header, each part after checksum, length and type."""
    joined, position = b"", 7
    while position + 7 <= len(content):
        left = BLOCK - position % BLOCK
        if left < 7:
            position += left
            continue
        length, kind = int.from_bytes(content[position + 4 : position + 6], "little"), content[position + 6]
        joined += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield joined
            joined = b""


class WandbFile:
    """What an offline run's record file holds.

    Each start of a run writes a segment of its own, which is the last one here.
    """

    def __init__(self, folder: Path, num_segments: int = 1) -> None:
        from wandb.proto.wandb_internal_pb2 import Record

        segments = sorted(folder.glob("wandb/offline-run-*/run-*.wandb"), key=lambda path: path.stat().st_mtime_ns)
        assert len(segments) == num_segments
        self.path = segments[-1]
        self.records: dict[str, list[Any]] = defaultdict(list)
        for chunk in chunks(self.path.read_bytes()):
            record = Record.FromString(chunk)
            kind = record.WhichOneof("record_type")
            self.records[kind].append(getattr(record, kind))
        (self.run,) = self.records["run"]

    @staticmethod
    def _items(items: Any) -> dict[str, Any]:
        return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}

    @property
    def config(self) -> dict[str, Any]:
        return self._items(self.run.config.update)

    @property
    def history(self) -> list[dict[str, Any]]:
        return [self._items(row.item) for row in self.records["history"]]

    @property
    def summary(self) -> dict[str, Any]:
        merged: dict[str, Any] = {}
        for row in self.records["summary"]:
            merged |= self._items(row.update)
        return merged

    @property
    def artifacts(self) -> dict[str, Any]:
        """By type; a table's own artifact is `run_table`."""
        requests = [row.log_artifact.artifact for row in self.records["request"] if row.HasField("log_artifact")]
        return {one.type: one for one in [*self.records["artifact"], *requests]}
