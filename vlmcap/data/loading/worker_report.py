"""How data workers start, and which clip one was at when it died or hung."""

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

from vlmcap.data.loading.shared_memory import pass_what_does_not_fit, shared_memory_problem, shared_zeros
from vlmcap.errors import UserError
from vlmcap.types import Clip

T_co = TypeVar("T_co", covariant=True)

_MAX_NAMED = 4
_MAX_WORKERS = 256  # of one loader; those beyond are not watched
_LAST_SECONDS = 120.0  # of a worker after SIGTERM
_DEATH = re.compile(
    r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (?:is killed by signal: (?P<signal>[^.]+)|exited unexpectedly)"
)
_TIMEOUT = re.compile(r"DataLoader timed out after ([\d.]+) seconds")
_START_S = 120.0  # for a worker to start, and for a busy disk
_MARGIN_S = 3.0  # of each clip, beyond the limit at which its decoder is stopped


def worker_options(num_workers: int, num_clips: int, clip_timeout_s: float) -> dict[str, Any]:
    """Arguments of a loader that say how its workers start, and for how long it waits for a batch of them.

    Args:
        num_workers: 0 for none.
        num_clips: The most clips of a batch.
        clip_timeout_s: After which the reading of a clip is given up. A clip may be tried twice.
    """
    if not num_workers:
        return {"num_workers": 0}
    timeout_s = _START_S + 2 * num_clips * (clip_timeout_s + _MARGIN_S)
    return {"num_workers": num_workers, "worker_init_fn": start_worker, "timeout": timeout_s}


def start_worker(_worker_id: int) -> None:
    """What each data worker does first."""
    leave_signals_to_main()
    pass_what_does_not_fit()


def leave_signals_to_main() -> None:
    """Makes a worker outlive the signals that stop a run, which a terminal and Slurm send to all of its processes.

    The main process needs batches up to the end of its step, and ends its workers itself. One that hangs is ended by an
    alarm, as torch's way to end it is SIGTERM too. Windows has Ctrl-C alone.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if not hasattr(signal, "SIGALRM"):
        return
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, _set_alarm)


def _set_alarm(*_: object) -> None:
    signal.setitimer(signal.ITIMER_REAL, _LAST_SECONDS)


class WorkerNotes:
    """What each worker of one loader reads at the moment, in memory that it shares with the main process.

    Args:
        clips: The clips that the data set's keys, indices or (epoch, index), count.
    """

    def __init__(self, clips: Sequence[Clip]) -> None:
        self._clips = clips
        self._rows = shared_zeros(_MAX_WORKERS, 2, dtype=torch.int64)  # process id, 1 + index or 0 between clips

    @contextmanager
    def reading(self, worker_id: int, index: int) -> Iterator[None]:
        """Around the reading of a clip."""
        self._rows[worker_id, 0], self._rows[worker_id, 1] = os.getpid(), 1 + index
        try:
            yield
        finally:
            self._rows[worker_id, 1] = 0

    def clips_read(self) -> list[Clip]:
        """The clips that workers read now."""
        return [self._clips[int(noted) - 1] for _, noted in self._rows.tolist() if noted]

    def readers(self) -> list[int]:
        """The processes that read a clip now, or died of one."""
        return [pid for pid, noted in self._rows.tolist() if noted]

    def clip_read_by(self, pid: int) -> Clip | None:
        """The clip that a worker process reads or died of.

        None between two clips and for processes that are no workers of this.
        """
        for owner, noted in self._rows.tolist():
            if owner == pid and noted:
                return self._clips[int(noted) - 1]
        return None


class WatchedDataset(Dataset[T_co]):
    """A map-style data set whose workers note what they read."""

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
    """Notes of the workers of all loaders of a run, and errors that name the clip where one of them dies."""

    def __init__(self) -> None:
        self._notes: list[WorkerNotes] = []

    def over(self, dataset: Dataset[T_co], clips: Sequence[Clip]) -> WatchedDataset[T_co]:
        """The data set to give to a loader in place of `dataset`, whose keys are indices of `clips` or (epoch, index)."""
        notes = WorkerNotes(clips)
        self._notes.append(notes)
        return WatchedDataset(dataset, notes)

    @contextmanager
    def naming_clips(self) -> Iterator[None]:
        """Around all that reads batches: a worker's death, or its silence, becomes a `UserError` that names its clip.

        torch raises it out of a signal handler, at any point of the main process, so the whole training belongs into
        the block.

        Raises:
            UserError: A data worker died, or no batch came for far longer than it may take.
        """
        try:
            yield
        except RuntimeError as error:
            if silence := _TIMEOUT.search(_text(error)):
                raise UserError(self._describe_silence(float(silence[1]))) from error
            if (death := _DEATH.search(_text(error))) is None:
                raise
            pids = [int(pid) for pid in death[1].replace(" ", "").split(",")]
            raise UserError(self._describe(pids, death["signal"])) from error
        except (EOFError, OSError) as error:
            if not _was_fetched(error):
                raise
            raise UserError(self._describe(self._dead_workers(), None)) from error

    def _dead_workers(self) -> list[int]:
        """The processes that ended while they read a clip."""
        alive = {child.pid for child in multiprocessing.active_children()}
        return [pid for notes in self._notes for pid in notes.readers() if pid not in alive]

    def _describe_silence(self, seconds: float) -> str:
        clips = [clip for notes in self._notes for clip in notes.clips_read()]
        reading = (
            f" while they read {', '.join(f'{clip.id} ({clip.video})' for clip in clips[:_MAX_NAMED])}" if clips else ""
        )
        cause = (
            shared_memory_problem()
            or "look at the disk of the videos, or set data.num_workers=0 to see what a worker does"
        )
        return f"no batch came from the data workers for {seconds:.0f} s{reading}: {cause}"

    def _describe(self, pids: list[int], signal_name: str | None) -> str:
        found = [notes.clip_read_by(pid) for pid in pids for notes in self._notes]
        clips = {clip.video: clip for clip in found if clip is not None}
        how = f" (signal {signal_name.strip()})" if signal_name else ""
        which = f", process {', '.join(map(str, pids))}," if pids else ""
        who = f"a data worker{which} died{how}"
        if not clips:
            return f"{who} between two clips: most often memory or /dev/shm ran out, so lower data.num_workers or data.batch_size"
        names = ", ".join(f"{clip.id} ({clip.video})" for clip in clips.values())
        return f"{who} while it read {names}: take that clip out if it happens again, or lower data.num_workers if memory ran out"


def _was_fetched(error: BaseException) -> bool:
    """Whether the error arose while a tensor was fetched from its worker.

    One that died in between cannot hand it over.
    """
    frames = traceback.walk_tb(error.__traceback__)
    return any(frame.f_globals.get("__name__") == "torch.multiprocessing.reductions" for frame, _ in frames)


def _text(error: BaseException) -> str:
    """The message, and those of the errors that led to it: which of two torch raises first is a matter of timing."""
    texts, cause = [str(error)], error.__cause__ or error.__context__
    while cause is not None:
        texts.append(str(cause))
        cause = cause.__cause__ or cause.__context__
    return "\n".join(texts)
