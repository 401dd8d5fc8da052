"""Seconds by part: what is innermost at a moment has that moment, so that parts add up to the whole."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch
from lightning.pytorch.profilers import Profiler
from torch.utils.data import Dataset, get_worker_info

OTHER = "other"


class Recorder(Protocol):
    """What is told where a step is: a clock, or a trace."""

    def enter(self, part: str) -> None:
        """A part begins inside the present one."""
        ...

    def leave(self) -> None:
        """The innermost part ends."""
        ...

    def turn(self, part: str) -> None:
        """The rest of the innermost part belongs to another one."""
        ...

    def pause(self) -> None:
        """A step ends, and no other begins at once."""
        ...

    def resume(self) -> None:
        """A step begins."""
        ...


class PartClock:
    """Seconds that each part took, without the parts inside it; what is in none is "other".

    Args:
        now: Seconds, from any start.
    """

    def __init__(self, now: Callable[[], float]) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.wall = 0.0  # between resume and pause, by readings of its own
        self._now, self._stack, self._last, self._begun = now, [OTHER], 0.0, 0.0
        self._is_running = False

    def enter(self, part: str) -> None:
        """A part begins inside the present one."""
        if self._is_running:
            self._charge()
            self._stack.append(part)

    def leave(self) -> None:
        """The innermost part ends."""
        if self._is_running:
            self._charge()
            self._stack.pop()

    def turn(self, part: str) -> None:
        """The rest of the innermost part belongs to another one."""
        if self._is_running:
            self._charge()
            self._stack[-1] = part

    def resume(self) -> None:
        """Runs, from now on in no part; does nothing while it runs."""
        if not self._is_running:
            self._is_running, self._stack = True, [OTHER]
            self._begun = self._last = self._now()

    def pause(self) -> None:
        """Stands still; does nothing while it does."""
        if self._is_running:
            self._charge()
            self.wall += self._now() - self._begun
            self._is_running = False

    def _charge(self) -> None:
        now = self._now()
        self.seconds[self._stack[-1]] += now - self._last
        self._last = now


class PartSpans:
    """The same parts as named spans of torch's profiler."""

    def __init__(self) -> None:
        self._spans: list[Any] = []
        self._is_running = False

    def enter(self, part: str) -> None:
        """A part begins inside the present one."""
        if self._is_running:
            from torch.profiler import record_function

            span = record_function(f"vlmcap: {part}")
            span.__enter__()
            self._spans.append(span)

    def leave(self) -> None:
        """The innermost part ends."""
        if self._is_running:
            self._spans.pop().__exit__(None, None, None)

    def turn(self, part: str) -> None:
        """The rest of the innermost part belongs to another one."""
        self.leave()
        self.enter(part)

    def resume(self) -> None:
        """A step begins."""
        if not self._is_running:
            self._is_running = True
            self.enter("step")

    def pause(self) -> None:
        """A step ends, with all spans that are open."""
        while self._spans:
            self.leave()
        self._is_running = False


class PlainSteps:
    """Seconds of steps that nobody looks into."""

    def __init__(self) -> None:
        self._seconds, self._count = 0.0, 0
        self._mark: float | None = None

    def begin(self) -> None:
        """A step begins, and the one before ends unless there was a pause."""
        now = time.perf_counter()
        if self._mark is not None:
            self._seconds, self._count = self._seconds + now - self._mark, self._count + 1
        self._mark = now

    def pause(self) -> None:
        """What comes now is no step, and what went on is not counted."""
        self._mark = None

    @property
    def mean_s(self) -> float | None:
        """Of a step, or None if there was none."""
        return self._seconds / self._count if self._count else None


FETCH = "[_TrainingEpochLoop].train_dataloader_next"
# Lightning's names of what it does, without the class in their middle, and our part.
_PARTS = {
    ("[Strategy]", "batch_to_device"): "transfer",
    ("[Strategy]", "training_step"): "other",
    ("[Strategy]", "backward"): "backward",
    ("[LightningModule]", "optimizer_zero_grad"): "optimiser",
    ("[LightningModule]", "optimizer_step"): "optimiser",  # forward and backward run inside, and are taken out
}


class Owner(Protocol):
    """Who is told."""

    def action_starts(self, name: str, part: str | None) -> None:
        """Lightning begins something that is this part, or of no part."""
        ...

    def action_stops(self, name: str, part: str | None) -> None:
        """Lightning has done it."""
        ...


class Actions(Profiler):
    """Passes on what Lightning says that it does.

    Args:
        owner: To whom.
    """

    def __init__(self, owner: Owner) -> None:
        super().__init__()
        self._owner = owner
        self._parts: dict[str, str | None] = {FETCH: "wait"}

    def start(self, action_name: str) -> None:
        """Passes on."""
        self._owner.action_starts(action_name, self._part(action_name))

    def stop(self, action_name: str) -> None:
        """Passes on."""
        self._owner.action_stops(action_name, self._part(action_name))

    def _part(self, action: str) -> str | None:
        if action not in self._parts:
            kind, _, rest = action.partition("]")
            self._parts[action] = _PARTS.get((f"{kind}]", rest.rpartition(".")[2]))
        return self._parts[action]


_STEP = ".validation_step"
_SCORES = "[Callback]CaptionEvaluation.on_validation_epoch_end"


class EvaluationTimes:
    """Seconds of all evaluations of a run; each is told by its start, what Lightning does in it, and its end."""

    def __init__(self) -> None:
        self.count = 0
        self.is_captioning = False  # the batch to come is one of prompts
        self._seconds = {"captions": 0.0, "scores": 0.0, "rest": 0.0}
        self._begun: float | None = None
        self._mark = 0.0

    def start(self) -> None:
        """An evaluation begins."""
        self._begun = time.perf_counter()

    def end(self) -> None:
        """An evaluation ends; all of it that was neither captions nor scores is the rest."""
        if self._begun is not None:
            self._seconds["rest"] += time.perf_counter() - self._begun
            self._begun = None
            self.count += 1

    def action_starts(self, name: str) -> None:
        """Lightning begins something."""
        if self._begun is not None:
            self._mark = time.perf_counter() if self._kind(name) else self._mark

    def action_stops(self, name: str) -> None:
        """Lightning has done something."""
        if self._begun is not None and (kind := self._kind(name)):
            seconds = time.perf_counter() - self._mark
            self._seconds[kind] += seconds
            self._seconds["rest"] -= seconds

    def a_step(self, steps_between: int) -> dict[str, float]:
        """Seconds of a mean evaluation over the steps from one to the next; empty where there was none."""
        return {name: seconds / self.count / steps_between for name, seconds in self._seconds.items()} if self.count else {}

    def _kind(self, name: str) -> str | None:
        if name.endswith(_STEP) and name.startswith("[Strategy]"):
            return "captions" if self.is_captioning else None
        return "scores" if name == _SCORES else None


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
