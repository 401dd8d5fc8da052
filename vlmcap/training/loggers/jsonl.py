"""The logger of `metrics.jsonl`, which every run has."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from vlmcap.files import write_text


class JsonlLogger(Logger):
    """Appends one JSON object per log step to a file: `step`, `epoch`, and the metrics.

    Args:
        path: Path of the file; its folder must exist.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    @property
    def name(self) -> str:
        """Stem of the file name."""
        return self.path.stem

    @property
    def version(self) -> str:
        """Empty, because a run folder holds a single run."""
        return ""

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Does nothing, because `config.yaml` holds the settings."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Appends one line in a single write, so that a crash damages at most the last line."""
        values = dict(metrics)
        epoch = values.pop("epoch", None)
        record = {
            "step": step,
            "epoch": None if epoch is None else int(epoch),
            **{name: float(value) for name, value in values.items()},
        }
        # Opened for each line, so that the file may be replaced between two of them, as `truncate_to` does.
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    @property
    def num_lines(self) -> int:
        """Number of lines in the file."""
        if not self.path.is_file():
            return 0
        with self.path.open("rb") as file:
            return sum(1 for _ in file)

    def truncate_to(self, num_lines: int) -> None:
        """Keeps the lines that existed when a checkpoint was saved; a resumed run writes the later ones again."""
        # A run that was stopped may have logged steps after its last checkpoint.
        if self.num_lines > num_lines:
            lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
            write_text(self.path, "".join(lines[:num_lines]))

    def drop_after(self, step: int) -> list[dict[str, Any]]:
        """Drops lines after `step` and a damaged last line, and returns the kept ones; a resumed run repeats them."""
        if not self.path.is_file():
            return []
        kept: list[tuple[str, dict[str, Any]]] = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
                if row["step"] <= step:
                    kept.append((line, row))
            # A line that a crash has cut, or one that no run writes.
            except (ValueError, KeyError, TypeError):
                continue
        write_text(self.path, "".join(f"{line}\n" for line, _ in kept))
        return [row for _, row in kept]
