"""A data worker that dies is reported with the clip that it was reading."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset
from torch.utils.data._utils import signal_handling
from torchdata.stateful_dataloader import StatefulDataLoader

from tests.thinned import thinned
from vlmcap.data.loading import worker_report
from vlmcap.data.loading.worker_report import WorkerWatch
from vlmcap.errors import UserError
from vlmcap.types import Clip

CLIPS = [Clip(f"clip{i}", f"videos/clip{i}.mp4", ("글",)) for i in range(40)]


@pytest.fixture(autouse=True)
def _patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch waits five seconds for a worker to end by itself before it ends it."""
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.2)


class Deadly(Dataset[int]):
    """Kills its process at one index."""

    def __init__(self, index: int, kill: Callable[[], Any]) -> None:
        self.index, self.kill = index, kill

    def __len__(self) -> int:
        return len(CLIPS)

    def __getitem__(self, key: int | tuple[int, int]) -> int:
        index = key[1] if isinstance(key, tuple) else key
        if index == self.index:
            self.kill()
        return index


def by_oom_killer() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def by_exit() -> None:
    os._exit(1)


Loader = type[DataLoader[Any]]


@pytest.mark.parametrize("loader", [DataLoader, StatefulDataLoader])
@pytest.mark.parametrize("kill", [by_oom_killer, by_exit])
def test_the_clip_is_named(loader: Loader, kill: Callable[[], Any]) -> None:
    watch = WorkerWatch()
    watch.watch(Deadly(-1, kill), CLIPS)  # of another loader
    keys = [(3, index) for index in range(40)]
    dataset = watch.watch(Deadly(23, kill), CLIPS)
    with (
        pytest.raises(
            UserError, match=r"^a data worker, process \d+, died.* while it read clip23 \(videos/clip23\.mp4\); "
        ) as caught,
        watch.as_user_errors(),
    ):
        for _ in loader(dataset, sampler=keys, batch_size=4, num_workers=2, collate_fn=list):
            pass
    assert isinstance(caught.value.__cause__, RuntimeError)


@pytest.fixture
def _fresh_handler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch sets its handler once a process, and Lightning takes it away after a training.

    Other tests may have done either.
    """
    before = signal.getsignal(signal.SIGCHLD)
    monkeypatch.setattr(signal_handling, "_SIGCHLD_handler_set", False)
    yield
    signal.signal(signal.SIGCHLD, before)


@pytest.mark.usefixtures("_fresh_handler")
@pytest.mark.parametrize("loader", [DataLoader, StatefulDataLoader])
def test_a_death_during_a_training_step_is_named_too(loader: Loader) -> None:
    watch = WorkerWatch()
    dataset = watch.watch(Deadly(2, by_oom_killer), CLIPS)
    with pytest.raises(UserError, match=r"died .* while it read clip2 "), watch.as_user_errors():
        batches = iter(loader(dataset, batch_size=1, num_workers=1, collate_fn=list))
        next(batches)
        time.sleep(20)  # interrupted by the handler of torch
        raise AssertionError("the death went unnoticed")


def test_a_death_between_two_clips_says_what_it_can() -> None:
    watch = WorkerWatch()
    dataset = watch.watch(Deadly(-1, by_exit), CLIPS)
    with pytest.raises(UserError, match=r"died.* between two clips, .*data\.num_workers"), watch.as_user_errors():
        batches = iter(loader := DataLoader(dataset, batch_size=1, num_workers=1, collate_fn=list))
        next(batches)
        time.sleep(0.5)
        os.kill(batches._workers[0].pid, signal.SIGKILL)  # type: ignore[attr-defined]
        list(batches)
    assert loader


def hand_over_and_die(watch: WorkerWatch, queue: Any, index: int | None) -> None:
    if index is not None:
        watch._notes[0]._notes[0, 0], watch._notes[0]._notes[0, 1] = os.getpid(), 1 + index
    queue.put(torch.zeros(3))
    time.sleep(0.5)  # until a thread of the queue has written it
    by_oom_killer()


@pytest.mark.parametrize(
    ("index", "said"),
    [
        (3, r", process \d+, died while it read clip3 "),
        (None, r" died between two clips, most likely because memory or "),
    ],
)
def test_a_batch_of_a_dead_worker_is_its_death(index: int | None, said: str) -> None:
    watch = WorkerWatch()
    watch.watch(Deadly(-1, by_exit), CLIPS)
    queue = torch.multiprocessing.get_context("fork").Queue()
    worker = torch.multiprocessing.get_context("fork").Process(target=hand_over_and_die, args=(watch, queue, index))
    worker.start()
    worker.join()
    with pytest.raises(UserError, match=f"^a data worker{said}") as caught, watch.as_user_errors():
        queue.get(timeout=30)
    assert isinstance(caught.value.__cause__, EOFError | OSError)
    with pytest.raises(FileNotFoundError), watch.as_user_errors():
        Path("nowhere").read_bytes()  # an error of the disk stays one


def test_other_errors_pass_unchanged() -> None:
    watch = WorkerWatch()
    with pytest.raises(RuntimeError, match=r"^CUDA out of memory$"), watch.as_user_errors():
        raise RuntimeError("CUDA out of memory")
    with pytest.raises(KeyError), watch.as_user_errors():
        raise KeyError("x")


def test_without_workers_it_only_passes_on() -> None:
    dataset = WorkerWatch().watch(Deadly(-1, by_exit), CLIPS)
    assert len(dataset) == 40
    assert (dataset[7], dataset[2, 9]) == (7, 9)


def test_spawned_workers_are_watched_too() -> None:
    watch = WorkerWatch()
    dataset = watch.watch(Deadly(1, by_oom_killer), CLIPS)
    with pytest.raises(UserError, match="while it read clip1 "), watch.as_user_errors():
        list(DataLoader(dataset, batch_size=1, num_workers=1, collate_fn=list, multiprocessing_context="spawn"))


@pytest.mark.slow
@pytest.mark.parametrize("loader", [DataLoader, StatefulDataLoader])
@pytest.mark.parametrize("problem", thinned([None, "/dev/shm has 1 MB free"], lambda problem: problem is None))
def test_a_worker_that_hangs_is_a_sentence_that_names_its_clip(
    loader: Loader, problem: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_report, "shared_memory_problem", lambda: problem)
    watch = WorkerWatch()
    dataset = watch.watch(Deadly(5, lambda: time.sleep(60)), CLIPS)
    cause = problem or r"check the disk .* data\.num_workers=0"
    with (
        pytest.raises(
            UserError, match=rf"^no batch came .* for 2 s while they read clip5 \(videos/clip5\.mp4\): {cause}"
        ),
        watch.as_user_errors(),
    ):
        list(loader(dataset, batch_size=4, num_workers=1, collate_fn=list, timeout=2))
