"""Batches of data workers arrive where shared memory is full, bit by bit."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset
from torchdata.stateful_dataloader import StatefulDataLoader

from vlmcap.data.loading import shared_memory
from vlmcap.data.loading.shared_memory import shared_memory_problem, shared_zeros
from vlmcap.data.loading.worker_report import start_worker, worker_options

Usage = namedtuple("Usage", "total used free")
DTYPES = [torch.uint8, torch.int64, torch.float32, torch.float16, torch.bfloat16, torch.bool]


class Tensors(Dataset[torch.Tensor]):
    def __len__(self) -> int:
        return 24

    def __getitem__(self, key: int) -> torch.Tensor:
        numbers = torch.arange(key, key + 100_000).remainder(2 if DTYPES[key % 6] is torch.bool else 251)
        return numbers.to(DTYPES[key % 6]).reshape(100, 1000)[:, : 10 * (key % 3)]  # a view, and an empty one


def require_all(loader: type[DataLoader[Any]], num_workers: int = 2) -> None:
    items = list(loader(Tensors(), batch_size=None, **worker_options(num_workers, 1, 5.0)))
    assert len(items) == 24
    for key, item in enumerate(items):
        assert item.dtype == DTYPES[key % 6] and torch.equal(item, Tensors()[key])


@pytest.mark.parametrize("loader", [DataLoader, StatefulDataLoader])
@pytest.mark.parametrize("error", [None, RuntimeError, OSError])
def test_what_does_not_fit_goes_through_the_pipe(
    monkeypatch: pytest.MonkeyPatch, loader: type[DataLoader[Any]], error: type[Exception] | None
) -> None:
    def refuse(storage: object) -> None:
        assert error is not None
        raise error("unable to write to file </torch_1>: No space left on device (28)")

    if error is not None:
        monkeypatch.setattr(shared_memory, "reduce_storage", refuse)
    require_all(loader)


SMALL = """
import torch
from tests.data.loading.test_shared_memory import require_all
from vlmcap.data.loading.shared_memory import shared_memory_problem
from torch.utils.data import DataLoader
assert "/dev/shm has" in shared_memory_problem()
require_all(DataLoader)
print("all there")
"""


def test_a_container_with_little_shared_memory_loses_no_batch() -> None:
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("namespaces are not allowed here")
    command = f"mount -t tmpfs -o size=1m tmpfs /dev/shm && exec {sys.executable} -c '{SMALL}'"
    done = subprocess.run(
        ["unshare", "-m", "bash", "-c", command],
        capture_output=True,
        text=True,
        timeout=240,
        cwd=Path(__file__).parents[3],
        check=False,
    )
    assert done.stdout == "all there\n", done.stderr


@pytest.mark.parametrize(
    ("free", "is_problem"),
    [(0, True), (64 * 2**20, True), (2**30 - 1, True), (2**30, False), (2**40, False), (None, False)],
)
def test_little_room_is_said_in_one_sentence(
    monkeypatch: pytest.MonkeyPatch, free: int | None, is_problem: bool
) -> None:
    def usage(path: str) -> Usage:
        assert path == "/dev/shm"
        if free is None:
            raise FileNotFoundError(path)
        return Usage(free, 0, free)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    sentence = shared_memory_problem()
    assert (sentence is not None) == is_problem
    if sentence is not None:
        assert "\n" not in sentence and "--shm-size=8g" in sentence and "data.num_workers=0" in sentence


def test_zeros_are_shared_where_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shared_zeros(3, 2, dtype=torch.bool).is_shared()

    def refuse(_: torch.Tensor) -> None:
        raise RuntimeError("unable to open shared memory object")

    monkeypatch.setattr(torch.Tensor, "share_memory_", refuse)
    zeros = shared_zeros(3, 2, dtype=torch.int64)
    assert zeros.tolist() == [[0, 0]] * 3


def test_loaders_wait_for_long_but_not_for_ever() -> None:
    assert worker_options(0, 8, 30.0) == {"num_workers": 0}
    options = worker_options(2, 8, 30.0)
    assert options["worker_init_fn"] is start_worker and 8 * 2 * 30 < options["timeout"] < 3600
