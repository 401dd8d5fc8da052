"""A run that is killed again and again, wherever it stands, ends bit for bit as one that is not."""

from __future__ import annotations

import multiprocessing
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch

NUM_KILLS, NUM_EPOCHS = 10, 8


class Pulse(L.Callback):
    """Tells the parent of each micro-batch."""

    def __init__(self, pipe: Connection) -> None:
        self.pipe = pipe

    def on_train_batch_end(self, *args: object) -> None:
        self.pipe.send_bytes(b".")


def run_training(folder: Path, settings: dict[str, Any], pipe: Connection) -> None:
    """Trains to the end, from the last checkpoint where there is one."""
    from tests.training.tiny_training import tiny_data, tiny_training

    multiprocessing.set_start_method(
        "fork", force=True
    )  # of data workers: the server's children would start a server each
    torch.set_num_threads(1)
    data = tiny_data(**settings)
    trainer, module = tiny_training(folder, data, num_epochs=NUM_EPOCHS, callbacks=[Pulse(pipe)])
    last = folder / "checkpoints" / "last.ckpt"
    trainer.fit(module, datamodule=data, ckpt_path=last if last.is_file() else None, weights_only=True)


def start(folder: Path, settings: dict[str, Any]) -> tuple[Any, Connection]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.training.tiny_training"])  # each process starts with the libraries at hand
    reader, writer = context.Pipe(duplex=False)
    process = context.Process(target=run_training, args=(folder, settings, writer))
    process.start()
    writer.close()
    return process, reader


def wait_for(pipe: Connection, pulses: int) -> int:
    """Pulses that came before the process closed the pipe, at most `pulses`."""
    for count in range(pulses):
        try:
            pipe.recv_bytes()
        except EOFError:
            return count
    return pulses


def finish(folder: Path, settings: dict[str, Any]) -> int:
    """Micro-batches of a run to its end."""
    process, pipe = start(folder, settings)
    count = wait_for(pipe, 10_000)
    process.join()
    assert process.exitcode == 0
    return count


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "num_workers"),
    [
        pytest.param({}, [0], id="shuffled in this process"),
        pytest.param({"batching": "by_length"}, [2], id="by length with workers"),
        pytest.param(
            {"batching": "packed", "max_tokens_per_batch": 90}, [2, 0, 1], id="packed with other workers each time"
        ),
    ],
)
def test_ten_kills_change_no_bit(tmp_path: Path, settings: dict[str, Any], num_workers: Sequence[int]) -> None:
    total = finish(tmp_path / "straight", settings | {"num_workers": num_workers[0]})
    rng = np.random.default_rng(len(num_workers))
    done = 0
    for kill in range(NUM_KILLS):
        process, pipe = start(tmp_path / "killed", settings | {"num_workers": num_workers[kill % len(num_workers)]})
        pulses = int(rng.integers(1, 10))
        done += wait_for(pipe, pulses)
        time.sleep(rng.random() * 0.02)  # inside a step, a checkpoint or a validation
        process.kill()
        process.join()
        done += wait_for(pipe, 10_000)  # what it did while this process slept
        assert process.exitcode == -signal.SIGKILL
    last = finish(tmp_path / "killed", settings | {"num_workers": num_workers[-1]})
    assert last < total < done + last, "killed in mid-run, and some batches done twice"
    check_same(tmp_path / "killed", tmp_path / "straight")


def check_same(killed: Path, straight: Path) -> None:
    mine, other = (torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True) for folder in (killed, straight))
    assert mine["global_step"] == other["global_step"] > 0
    assert mine["vlmcap"]["position"] == other["vlmcap"]["position"]
    assert mine["vlmcap"]["position"]["batches"] == 0
    assert mine["state_dict"].keys() == other["state_dict"].keys()
    assert [
        name for name, tensor in other["state_dict"].items() if not torch.equal(tensor, mine["state_dict"][name])
    ] == []
    moments = [checkpoint["optimizer_states"][0]["state"] for checkpoint in (mine, other)]
    assert all(
        torch.equal(value, moments[0][index][key])
        for index, state in moments[1].items()
        for key, value in state.items()
    )
    assert torch.equal(mine["vlmcap"]["random"]["torch"], other["vlmcap"]["random"]["torch"])


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_a_run_resumed_from_any_checkpoint_of_a_resumed_run_ends_the_same(tmp_path: Path) -> None:
    """Every chain of two resumes: where each of them stands must not hang on how it came there."""
    from tests.training.tiny_training import tiny_data, tiny_training

    settings = {
        "batching": "packed",
        "max_tokens_per_batch": 90,
    }  # eight batches, four steps: each second checkpoint ends an epoch

    def run(resumed: Path | None) -> list[Path]:
        """Trains to the end, and returns copies of the checkpoints on the way."""
        folder, copies = Path(tempfile.mkdtemp(dir=tmp_path)), []
        data = tiny_data(**settings)
        trainer, module = tiny_training(folder, data, num_epochs=2)
        save = trainer.strategy.save_checkpoint

        def save_and_copy(checkpoint: dict[str, Any], path: Any, *args: Any, **kwargs: Any) -> None:
            save(checkpoint, path, *args, **kwargs)
            copies.append(folder / f"{len(copies)}.ckpt")
            shutil.copy(path, copies[-1])

        trainer.strategy.save_checkpoint = save_and_copy  # type: ignore[method-assign]
        trainer.fit(module, datamodule=data, ckpt_path=resumed, weights_only=True)
        return copies

    straight = run(None)
    assert len(straight) == 6
    for first in straight:
        for second in [None, *run(first)]:
            ends = run(second or first)
            if ends:
                check_same(ends[-1].parent, straight[-1].parent)


@pytest.mark.slow
def test_the_program_killed_three_times_changes_no_bit(tmp_path: Path, tiny_cache: Path) -> None:
    from tests.conftest import TINY_RUN

    def command(folder: Path, *overrides: str) -> list[str]:
        every = ("trainer.checkpoint_every_n_steps=2", "tuning.lora.dropout=0.1", "evaluation.every_n_epochs=2")
        places = (f"paths.output_dir={folder}", f"paths.cache_dir={tiny_cache}")
        return [sys.executable, "train.py", *TINY_RUN, *every, *places, *overrides]

    root, last = Path(__file__).resolve().parents[2], tmp_path / "killed" / "checkpoints" / "last.ckpt"
    subprocess.run(command(tmp_path / "straight"), cwd=root, check=True, stdout=subprocess.DEVNULL)
    for steps in (2, 4, 6):
        process = subprocess.Popen(
            command(tmp_path / "killed", *(["checkpoint=last"] if last.is_file() else [])), cwd=root
        )
        while process.poll() is None and not (
            last.is_file() and torch.load(last, weights_only=True)["global_step"] >= steps
        ):
            time.sleep(0.01)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    subprocess.run(command(tmp_path / "killed", "checkpoint=last"), cwd=root, check=True, stdout=subprocess.DEVNULL)
    check_same(tmp_path / "killed", tmp_path / "straight")
