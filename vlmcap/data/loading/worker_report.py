"""Startup of data workers, and errors that name the clip at which a worker died or hung."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch.utils.data import Dataset, get_worker_info

from vlmcap.data.loading.shared_memory import shared_memory_problem, shared_zeros, use_pipes_when_full
from vlmcap.errors import UserError
from vlmcap.types import Clip

T_co = TypeVar("T_co", covariant=True)

_MAX_NAMED_CLIPS = 4
_MAX_WORKERS = 256  # per loader; further workers are not watched
_ALARM_S = 120.0  # time that a worker may live on after SIGTERM
# Matches "DataLoader worker (pid 123) is killed by signal: Killed." and "DataLoader worker (pid(s) 1, 2) exited
# unexpectedly".
_DEATH = re.compile(
    r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (?:is killed by signal: (?P<signal>[^.]+)|exited unexpectedly)"
)
_TIMEOUT = re.compile(r"DataLoader timed out after ([\d.]+) seconds")
_START_S = 120.0  # for a worker to start, and for a busy disk
_MARGIN_S = 3.0  # per clip, on top of the limit at which its decoder is stopped


def worker_options(num_workers: int, num_clips: int, clip_timeout_s: float) -> dict[str, Any]:
    """Returns the loader arguments for the startup of its workers and for how long it waits for a batch.

    Args:
        num_workers: Number of workers; 0 loads in the main process.
        num_clips: Largest number of clips in a batch.
        clip_timeout_s: Time limit for reading a clip, which may be tried twice.
    """
    if not num_workers:
        return {"num_workers": 0}
    # Twice the limit of each clip, as a clip whose decoder is lost may be tried again.
    timeout_s = _START_S + 2 * num_clips * (clip_timeout_s + _MARGIN_S)
    return {"num_workers": num_workers, "worker_init_fn": start_worker, "timeout": timeout_s}


def start_worker(_worker_id: int) -> None:
    """Prepares a data worker; its `worker_init_fn`."""
    leave_signals_to_main()
    use_pipes_when_full()


def leave_signals_to_main() -> None:
    """Makes a worker survive the signals that stop a run, which a terminal and Slurm send to all of its processes.

    The main process needs batches until the end of its step and ends its workers itself. A worker that hangs is ended
    by an alarm, because torch also uses SIGTERM to end workers. Windows knows Ctrl-C alone.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if not hasattr(signal, "SIGALRM"):
        return
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, _set_alarm)


def _set_alarm(*_: object) -> None:
    # The worker lives on until the main process has saved, and ends by the alarm if nobody else ends it.
    signal.setitimer(signal.ITIMER_REAL, _ALARM_S)


class WorkerNotes:
    """The clip that each worker of one loader is reading, in memory shared with the main process.

    Args:
        clips: Clips that the data set's keys, index or (epoch, index), refer to.
    """

    def __init__(self, clips: Sequence[Clip]) -> None:
        self._clips = clips
        self._notes = shared_zeros(_MAX_WORKERS, 2, dtype=torch.int64)  # process id, and 1 + index or 0 between clips

    @contextmanager
    def reading(self, worker_id: int, index: int) -> Iterator[None]:
        """Notes that a worker reads a clip inside the block."""
        self._notes[worker_id, 0], self._notes[worker_id, 1] = os.getpid(), 1 + index
        try:
            yield
        finally:
            self._notes[worker_id, 1] = 0

    def clips_read(self) -> list[Clip]:
        """Returns the clips that workers are reading."""
        return [self._clips[int(noted) - 1] for _, noted in self._notes.tolist() if noted]

    def readers(self) -> list[int]:
        """Returns the ids of the processes that are reading a clip or died while they read one."""
        return [pid for pid, noted in self._notes.tolist() if noted]

    def clip_read_by(self, pid: int) -> Clip | None:
        """Returns the clip that a worker process is reading or died of.

        None between two clips, and for processes that are not workers of this loader.
        """
        for owner, noted in self._notes.tolist():
            if owner == pid and noted:
                return self._clips[int(noted) - 1]
        return None


class WatchedDataset(Dataset[T_co]):
    """A map-style data set whose workers note which clip they are reading."""

    def __init__(self, dataset: Dataset[T_co], notes: WorkerNotes) -> None:
        self.dataset, self.notes = dataset, notes

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, key: Any) -> T_co:
        worker = get_worker_info()
        if worker is None or worker.id >= _MAX_WORKERS:
            return self.dataset[key]
        with self.notes.reading(worker.id, int(key[1] if isinstance(key, tuple) else key)):
            return self.dataset[key]


class WorkerWatch:
    """Notes of the workers of all loaders of a run, from which errors name the clip at which a worker died."""

    def __init__(self) -> None:
        self._notes: list[WorkerNotes] = []

    def watch(self, dataset: Dataset[T_co], clips: Sequence[Clip]) -> WatchedDataset[T_co]:
        """Wraps a data set for a loader.

        Args:
            dataset: Data set whose keys are an index of `clips` or (epoch, index).
            clips: Clips of the data set.
        """
        notes = WorkerNotes(clips)
        self._notes.append(notes)
        return WatchedDataset(dataset, notes)

    @contextmanager
    def as_user_errors(self) -> Iterator[None]:
        """Converts the death or silence of a worker inside the block into a `UserError` that names its clip.

        torch raises the error out of a signal handler, at any point of the main process, so the block must contain the
        whole training.

        Raises:
            UserError: A data worker died, or no batch came for far longer than it may take.
        """
        try:
            yield
        except RuntimeError as error:
            if silence := _TIMEOUT.search(_chained_message(error)):
                raise UserError(self._describe_silence(float(silence[1]))) from error
            if (death := _DEATH.search(_chained_message(error))) is None:
                raise
            pids = [int(pid) for pid in death[1].replace(" ", "").split(",")]
            raise UserError(self._describe_death(pids, death["signal"])) from error
        except (EOFError, OSError) as error:
            if not _is_from_tensor_transfer(error):
                raise
            raise UserError(self._describe_death(self._dead_workers(), None)) from error

    def _dead_workers(self) -> list[int]:
        """Returns the ids of the processes that ended while they read a clip."""
        alive = {child.pid for child in multiprocessing.active_children()}
        return [pid for notes in self._notes for pid in notes.readers() if pid not in alive]

    def _describe_silence(self, seconds: float) -> str:
        clips = [clip for notes in self._notes for clip in notes.clips_read()]
        named = ", ".join(f"{clip.id} ({clip.video})" for clip in clips[:_MAX_NAMED_CLIPS])
        reading = f" while they read {named}" if clips else ""
        cause = (
            shared_memory_problem()
            or "check the disk of the videos, or set data.num_workers=0 to see what a worker is doing"
        )
        return f"no batch came from the data workers for {seconds:.0f} s{reading}: {cause}"

    def _describe_death(self, pids: list[int], signal_name: str | None) -> str:
        being_read = [notes.clip_read_by(pid) for pid in pids for notes in self._notes]
        clips = {clip.video: clip for clip in being_read if clip is not None}
        how = f" (signal {signal_name.strip()})" if signal_name else ""
        which = f", process {', '.join(map(str, pids))}," if pids else ""
        who = f"a data worker{which} died{how}"
        if not clips:
            return (
                f"{who} between two clips, most likely because memory or /dev/shm ran out; lower data.num_workers or "
                "data.batch_size"
            )
        names = ", ".join(f"{clip.id} ({clip.video})" for clip in clips.values())
        return (
            f"{who} while it read {names}; remove that clip if it happens again, or lower data.num_workers if memory "
            "ran out"
        )


def _is_from_tensor_transfer(error: BaseException) -> bool:
    """Returns whether the error arose while a tensor was fetched from its worker, which died before handing it over."""
    frames = traceback.walk_tb(error.__traceback__)
    return any(frame.f_globals.get("__name__") == "torch.multiprocessing.reductions" for frame, _ in frames)


def _chained_message(error: BaseException) -> str:
    """Joins the messages of the error and its causes; which of its two errors torch raises first depends on timing."""
    texts, cause = [str(error)], error.__cause__ or error.__context__
    while cause is not None:
        texts.append(str(cause))
        cause = cause.__cause__ or cause.__context__
    return "\n".join(texts)
