"""A call that hangs, crashes or eats memory costs its own answer and nothing else.

No zombie, no descriptor, no other call's answer.
"""

from __future__ import annotations

import ctypes
import gc
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vlmcap.data.loading import isolation
from vlmcap.data.loading.isolation import Isolated, LostError, is_available
from vlmcap.errors import UserError

pytestmark = pytest.mark.skipif(not is_available(), reason="needs fork")

GIB = 2**30


def behave(request: Any) -> tuple[dict[str, Any], Tensor | None]:
    """What a request asks for, as a decoder in C would do it."""
    match request:
        case "pid":
            return {"pid": os.getpid()}, None
        case "hang":
            signal.pthread_sigmask(signal.SIG_BLOCK, set(signal.valid_signals()))
            while True:
                signal.pause()
        case "spin":
            while True:
                pass
        case "hold the GIL":
            ctypes.PyDLL(None).pause()
        case "segfault":
            ctypes.string_at(0)
        case "abort":
            os.abort()
        case "exit":
            os._exit(3)
        case "eat":
            eaten = [bytearray(2**28) for _ in range(10_000)]
            return {"eaten": len(eaten)}, None
        case "eat with torch":
            return {}, torch.zeros(2**44, dtype=torch.uint8)
        case "mistake":
            raise UserError("data.num_frames must be even")
        case "bug":
            raise KeyError("Schlüssel")
        case ["tensor", kind, *shape]:
            return {"한글": "값"}, torch.arange(int(np.prod(shape))).to(getattr(torch, kind)).reshape(shape)
    return {}, None


@pytest.fixture
def isolated() -> Iterator[Isolated]:
    one = Isolated(timeout_s=20.0, memory_gib=0.5)
    yield one
    one.close()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> Iterator[Isolated]:
    monkeypatch.setattr(isolation, "_GRACE_S", 0.2)
    one = Isolated(timeout_s=0.5, memory_gib=0.5)
    yield one
    one.close()


def open_files() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


def children() -> list[int]:
    tasks = Path("/proc/self/task").glob("*/children")
    return [int(pid) for task in tasks for pid in task.read_text().split()]


@pytest.mark.parametrize("kind", ["uint8", "float32", "bfloat16", "int64", "bool"])
@pytest.mark.parametrize("shape", [[2, 3, 5, 7], [1], [0, 3], []])
def test_tensors_come_back_bit_by_bit(isolated: Isolated, kind: str, shape: list[int]) -> None:
    facts, tensor = isolated.call(behave, ["tensor", kind, *shape])
    assert facts == {"한글": "값"}
    expected = behave(["tensor", kind, *shape])[1]
    assert tensor is not None and expected is not None
    assert tensor.dtype == expected.dtype and tensor.shape == expected.shape
    assert torch.equal(tensor, expected)


def test_large_tensors_come_back(isolated: Isolated) -> None:
    _, tensor = isolated.call(behave, ["tensor", "uint8", 16, 3, 448, 448])
    assert torch.equal(tensor, behave(["tensor", "uint8", 16, 3, 448, 448])[1])  # type: ignore[arg-type]


def test_one_child_answers_all_calls(isolated: Isolated) -> None:
    pids = {isolated.call(behave, "pid")[0]["pid"] for _ in range(5)}
    assert len(pids) == 1 and os.getpid() not in pids


@pytest.mark.parametrize("how", ["hang", "spin", "hold the GIL"])
def test_what_never_returns_costs_its_time_only(impatient: Isolated, how: str) -> None:
    before = impatient.call(behave, "pid")[0]["pid"]
    with pytest.raises(LostError, match=r"^decoding took longer than data\.decode_timeout_s=0\.5 and was stopped$"):
        impatient.call(behave, how)
    assert impatient.call(behave, "pid")[0]["pid"] != before
    assert before not in children()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("segfault", r"^the decoder crashed \(signal SIGSEGV\)$"),
        ("abort", r"^the decoder crashed \(signal SIGABRT\)$"),
        ("exit", "^the decoder ended without an answer$"),
        ("eat", r"^decoding needs more memory than data\.decode_memory_gib=0\.5$"),
        ("eat with torch", r"^decoding needs more memory than data\.decode_memory_gib=0\.5$"),
    ],
)
def test_what_dies_is_told_in_one_sentence(
    isolated: Isolated, how: str, message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(LostError, match=message):
        isolated.call(behave, how)
    assert isolated.call(behave, "pid")[0]["pid"] != os.getpid()
    assert capfd.readouterr() == ("", "")


def test_a_child_that_earlier_calls_may_have_damaged_gets_a_second_try(isolated: Isolated, tmp_path: Path) -> None:
    log = tmp_path / "pids"

    def crash_once(request: Any) -> tuple[dict[str, Any], Tensor | None]:
        with log.open("a") as file:
            file.write(f"{os.getpid()}\n")
        if request == "bad" or (request == "good" and len(log.read_text().splitlines()) == 2):
            ctypes.string_at(0)
        return {"ok": True}, None

    assert isolated.call(crash_once, "first") == ({"ok": True}, None)
    assert isolated.call(crash_once, "good") == (
        {"ok": True},
        None,
    )  # the second call ever crashes, its repetition does not
    with pytest.raises(LostError):
        isolated.call(crash_once, "bad")
    assert len(set(log.read_text().split())) == 3  # the last of them tried "bad" afresh


def test_a_child_lost_between_two_calls_is_nobodys_fault(isolated: Isolated) -> None:
    os.kill(isolated.call(behave, "pid")[0]["pid"], signal.SIGKILL)
    time.sleep(0.05)
    assert isolated.call(behave, ["tensor", "uint8", 1])[1] is not None


def test_signals_for_the_run_leave_the_child_alone(isolated: Isolated) -> None:
    pid = isolated.call(behave, "pid")[0]["pid"]
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        os.kill(pid, number)
    assert isolated.call(behave, "pid")[0]["pid"] == pid


def test_our_mistakes_and_the_users_are_raised(isolated: Isolated) -> None:
    with pytest.raises(UserError, match=r"^data\.num_frames must be even$"):
        isolated.call(behave, "mistake")
    with pytest.raises(RuntimeError, match=r"(?s)in the decoding process.*KeyError: 'Schlüssel'"):
        isolated.call(behave, "bug")


def test_an_interrupted_call_does_not_answer_the_next(isolated: Isolated, monkeypatch: pytest.MonkeyPatch) -> None:
    isolated.call(behave, "pid")

    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(isolation._Child, "_receive", interrupt)
        with pytest.raises(KeyboardInterrupt):
            isolated.call(behave, ["tensor", "uint8", 4])
    assert isolated.call(behave, "nothing") == ({}, None)


@pytest.mark.slow
def test_fifty_losses_leave_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isolation, "_GRACE_S", 0.0)
    gc.collect()
    files, before = open_files(), children()
    isolated = Isolated(timeout_s=0.02, memory_gib=0.5)
    for i in range(50):
        with pytest.raises(LostError):
            isolated.call(behave, ("hang", "segfault", "exit")[i % 3])
    isolated.close()
    assert open_files() == files
    assert children() == before


def test_the_child_ends_with_its_owner() -> None:
    files, before = open_files(), children()
    isolated = Isolated(timeout_s=20.0, memory_gib=0.5)
    isolated.call(behave, "pid")
    assert len(children()) == len(before) + 1
    del isolated
    gc.collect()
    assert (open_files(), children()) == (files, before)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a hanging child outlives a killed parent")
def test_a_hanging_child_dies_with_a_killed_parent(tmp_path: Path) -> None:
    script = """
import os, time
from vlmcap.data.loading.isolation import Isolated
def hang(request):
    print(os.getpid(), flush=True)
    time.sleep(600)
Isolated(600.0, 0.5).call(hang, 0)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[3]
    )
    assert process.stdout is not None
    child = int(process.stdout.readline())
    process.kill()
    process.wait()
    process.stdout.close()
    wait_until(lambda: not is_running(child))


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 20
    while not is_so():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def test_copies_have_children_of_their_own(isolated: Isolated) -> None:
    pid = isolated.call(behave, "pid")[0]["pid"]
    copy = pickle.loads(pickle.dumps(isolated))
    assert (copy.timeout_s, copy.memory_gib) == (20.0, 0.5)
    assert copy.call(behave, "pid")[0]["pid"] != pid
    copy.close()
    assert isolated.call(behave, "pid")[0]["pid"] == pid


class Numbers(Dataset[tuple[int, int]]):
    def __init__(self) -> None:
        self.isolated = Isolated(20.0, 0.5)

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> tuple[int, int]:
        if index == 7:
            with pytest.raises(LostError):
                self.isolated.call(behave, "segfault")
        return index, self.isolated.call(behave, "pid")[0]["pid"]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_data_workers_have_children_too(num_workers: int) -> None:
    numbers = Numbers()
    main_pid = numbers[0][1]  # so that the workers are forked with a child of the main process
    rows = [
        row for batch in DataLoader(numbers, batch_size=2, num_workers=num_workers, collate_fn=list) for row in batch
    ]
    assert [index for index, _ in rows] == list(range(12))
    pids = {pid for _, pid in rows}
    assert len(pids) == (3 if num_workers else 2)
    assert os.getpid() not in pids
    assert (main_pid in pids) == (num_workers == 0)
    wait_until(lambda: not any(is_running(pid) for pid in pids - {main_pid}) or num_workers == 0)
    numbers.isolated.close()
