"""A run that a signal stops keeps its last step, and goes on from it as one that was not stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import TINY_RUN
from tests.training.test_resume import COMMON, check_same_end, load
from vlmcap.config import Config
from vlmcap.errors import StoppedBySignal, UserError
from vlmcap.training.callbacks.requeue import StopOnSignal, requeue
from vlmcap.training.module import CaptioningModule
from vlmcap.training.run import train

MakeConfig = Callable[..., Config]
ROOT = Path(__file__).resolve().parents[2]


def signal_at(step: int, number: int, patch: pytest.MonkeyPatch, hook: str = "training_step") -> None:
    """Sends this process a signal inside the first micro-batch of a step, or inside validation after it."""
    original = getattr(CaptioningModule, hook)
    sent = []

    def changed(self: CaptioningModule, *args: Any) -> Any:
        if self.global_step == step and not sent:
            sent.append(number)
            os.kill(os.getpid(), number)
        return original(self, *args)

    patch.setattr(CaptioningModule, hook, changed)


@pytest.mark.parametrize(
    ("step", "number", "hook", "saved"),
    [
        pytest.param(2, signal.SIGTERM, "training_step", 3, id="SIGTERM", marks=pytest.mark.slow),
        pytest.param(5, signal.SIGUSR1, "training_step", 6, id="SIGUSR1 in the second stage"),
        pytest.param(1, signal.SIGINT, "training_step", 2, id="Ctrl-C", marks=pytest.mark.slow),
        pytest.param(
            3, signal.SIGTERM, "training_step", 4, id="SIGTERM in an epoch's last step", marks=pytest.mark.slow
        ),
        pytest.param(4, signal.SIGTERM, "validation_step", 4, id="SIGTERM in validation", marks=pytest.mark.slow),
    ],
)
def test_a_run_stopped_by_a_signal_resumes_to_the_same_end(
    straight_run: Path, tiny_config: MakeConfig, tmp_path: Path, step: int, number: int, hook: str, saved: int
) -> None:
    folder = tmp_path / "run"
    before = {one: signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    with pytest.MonkeyPatch.context() as patch:
        signal_at(step, number, patch, hook)
        with pytest.raises(StoppedBySignal, match=rf"after step {saved}; .* checkpoint=last") as stopped:
            train(tiny_config(folder, *COMMON))
    assert stopped.value.exit_code == 128 + number
    assert {one: signal.getsignal(one) for one in before} == before
    assert load(folder)["global_step"] == saved, "two micro-batches a step, and the signal came in the first"
    train(tiny_config(folder, *COMMON, "checkpoint=last"))
    check_same_end(folder, straight_run)


@pytest.mark.slow
def test_a_second_signal_does_not_wait(tmp_path: Path) -> None:
    stop = StopOnSignal(tmp_path)
    with stop.listening():
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    code = (
        "import os, signal, sys, time, pathlib\n"
        "from vlmcap.training.callbacks.requeue import StopOnSignal\n"
        "with StopOnSignal(pathlib.Path('.')).listening():\n"
        "    for _ in range(2): os.kill(os.getpid(), signal.SIGTERM)\n"
        "    time.sleep(20)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, "saving after this step" in done.stderr) == (-signal.SIGTERM, True)


def test_a_requeued_command_goes_on_by_itself(straight_run: Path, tiny_config: MakeConfig, tmp_path: Path) -> None:
    """Slurm starts the same command again, which cannot say checkpoint=last the first time."""
    command = (*COMMON, "trainer.requeue=true")
    with pytest.MonkeyPatch.context() as patch:
        signal_at(2, signal.SIGTERM, patch)
        with pytest.raises(StoppedBySignal):
            train(tiny_config(tmp_path / "run", *command))
    train(tiny_config(tmp_path / "run", *command))
    check_same_end(tmp_path / "run", straight_run)


def fake_scontrol(folder: Path, patch: pytest.MonkeyPatch, *, code: int = 0) -> Path:
    """A `scontrol` on the path that writes down what it was asked."""
    folder.mkdir()
    program = folder / "scontrol"
    program.write_text(
        f'#!/bin/sh\necho "$@" >> {folder}/asked\necho "Invalid job id" >&2\nexit {code}\n', encoding="utf-8"
    )
    program.chmod(0o755)
    patch.setenv("PATH", str(folder), prepend=os.pathsep)
    return folder / "asked"


@pytest.mark.parametrize(
    ("variables", "asked"),
    [
        ({"SLURM_JOB_ID": "12"}, "requeue 12"),
        ({"SLURM_JOB_ID": "14", "SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "2"}, "requeue 12_2"),
    ],
)
def test_slurm_is_asked_for_another_turn(
    variables: dict[str, str],
    asked: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = fake_scontrol(tmp_path / "bin", monkeypatch)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    requeue()
    assert file.read_text(encoding="utf-8") == f"{asked}\n"
    assert "was requeued" in capsys.readouterr().out
    fake_scontrol(tmp_path / "other", monkeypatch, code=1)
    requeue()
    assert "Invalid job id" in capsys.readouterr().out


def test_outside_of_slurm_nothing_is_asked(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    requeue()
    assert "not a Slurm job" in capsys.readouterr().out


def program(folder: Path, cache: Path, *overrides: str) -> list[str]:
    return [sys.executable, "train.py", *TINY_RUN, f"paths.output_dir={folder}", f"paths.cache_dir={cache}", *overrides]


def slurm_task() -> dict[str, str]:
    """What Slurm sets for a task of one; Lightning then answers SIGUSR1 and SIGTERM in its own way, unless we do."""
    names = {"SLURM_JOB_ID": "12", "SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
    return (
        os.environ
        | names
        | {
            "SLURM_JOB_NAME": "train",
            "SLURM_NNODES": "1",
            "SLURM_NTASKS_PER_NODE": "1",
            "SLURM_JOB_NODELIST": "localhost",
        }
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "settings"),
    [(signal.SIGTERM, ["data.num_workers=2"]), (signal.SIGUSR1, ["trainer.requeue=true"])],
    ids=["whole process group, data workers", "USR1 as a Slurm task"],
)
def test_the_program_is_stopped_from_outside(
    number: int, settings: Sequence[str], tmp_path: Path, tiny_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, asked = tmp_path / "run", fake_scontrol(tmp_path / "bin", monkeypatch)
    command = program(
        folder,
        tiny_cache,
        "tuning.epochs=201",
        "trainer.log_every_n_steps=1",
        "evaluation.every_n_epochs=100",
        *settings,
    )
    process = subprocess.Popen(
        command, cwd=ROOT, env=slurm_task(), stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    rows = folder / "metrics.jsonl"
    while process.poll() is None and not (rows.is_file() and rows.read_text(encoding="utf-8").count("\n") > 10):
        time.sleep(0.05)
    os.killpg(process.pid, number)
    _, errors = process.communicate(timeout=60)
    name = signal.Signals(number).name
    assert process.returncode == 128 + number, errors
    assert f"Stopped by {name} after step" in errors
    assert "Traceback" not in errors
    last = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["global_step"] == json.loads(rows.read_text(encoding="utf-8").splitlines()[-1])["step"]
    assert asked.is_file() == (number == signal.SIGUSR1)
    assert not list(folder.glob("hpc_ckpt*"))


# --- one folder, one run ----------------------------------------------------------------------------------------------


def test_a_folder_that_holds_a_run_is_refused(straight_run: Path, tiny_config: MakeConfig) -> None:
    before = {path: path.stat().st_mtime_ns for path in straight_run.rglob("*")}
    with pytest.raises(
        UserError, match=r"already holds a run \(summary\.json\); .*checkpoint=last, or set paths\.overwrite=true"
    ):
        train(tiny_config(straight_run, *COMMON))
    assert {path: path.stat().st_mtime_ns for path in straight_run.rglob("*")} == before


def test_overwriting_is_asked_for(tiny_config: MakeConfig, tmp_path: Path) -> None:
    train(tiny_config(tmp_path / "run", "trainer.max_steps=1"))
    train(tiny_config(tmp_path / "run", "trainer.max_steps=2", "paths.overwrite=true"))
    assert load(tmp_path / "run")["global_step"] == 2
