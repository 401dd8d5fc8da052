"""How long clips take to be read, wherever that happens: in this process or in data workers."""

from __future__ import annotations

import time
from typing import Any, TypeVar

import torch
from torch.utils.data import Dataset, get_worker_info

T_co = TypeVar("T_co", covariant=True)

_MAX_WORKERS = 256  # of one loader; the rest share the last row and may lose a clip of each other's


class ReadTimes:
    """Seconds and number of clips read, by worker, in memory that workers share with the main process."""

    def __init__(self) -> None:
        self._rows = torch.zeros(_MAX_WORKERS, 2, dtype=torch.float64).share_memory_()  # seconds, clips
        self._before = self._after = (0.0, 0.0)

    def over(self, dataset: Dataset[T_co]) -> TimedDataset[T_co]:
        """The data set to read in place of `dataset`."""
        return TimedDataset(dataset, self)

    def add(self, worker_id: int, seconds: float) -> None:
        """Counts a clip; each worker has a row of its own, so nothing is locked."""
        row = self._rows[min(worker_id, _MAX_WORKERS - 1)]
        row[0] += seconds
        row[1] += 1

    def begin(self) -> None:
        """The timed steps begin."""
        self._before = self._totals()

    def end(self) -> None:
        """The timed steps end."""
        self._after = self._totals()

    @property
    def seconds_a_clip(self) -> float:
        """A mean, of what was read while the timed steps ran.

        Workers read ahead, so those are clips of later steps; where they had read all, it is the mean of the whole run until then.
        """
        seconds, clips = self._after[0] - self._before[0], self._after[1] - self._before[1]
        return seconds / clips if clips else self._after[0] / max(1.0, self._after[1])

    def _totals(self) -> tuple[float, float]:
        """Seconds and clips so far, added over workers."""
        seconds, clips = self._rows.sum(dim=0).tolist()
        return seconds, clips


class TimedDataset(Dataset[T_co]):
    """A map-style data set that says how long each sample took."""

    def __init__(self, dataset: Dataset[T_co], times: ReadTimes) -> None:
        self.dataset, self.times = dataset, times

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, key: Any) -> T_co:
        started = time.perf_counter()
        sample = self.dataset[key]
        worker = get_worker_info()
        self.times.add(0 if worker is None else worker.id, time.perf_counter() - started)
        return sample
