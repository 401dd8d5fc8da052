"""The end of a run that a signal asks for: SIGTERM of Slurm or a spot machine, SIGUSR1 of Slurm, Ctrl-C."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import lightning as L
from lightning.pytorch.callbacks import WeightAveraging

from vlmcap.errors import StoppedBySignal
from vlmcap.training.random_state import random_states, set_random_states

_SIGUSR1 = getattr(signal, "SIGUSR1", None)  # Windows has none
STOPPING = tuple(number for number in (signal.SIGTERM, _SIGUSR1, signal.SIGINT) if number is not None)
_JOB = ("SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_JOB_ID")


class StopOnSignal(L.Callback):
    """Saves `last.ckpt` at the end of the optimiser step that a signal comes in, and stops.

    Inside accumulation it waits, as no checkpoint holds gradients; inside validation it stops at the next batch, with
    the state of the step before, and the resumed run repeats the validation. After the last validation the state is
    saved already, and the run stops before the final scoring, or at its next batch. A second signal ends the process at
    once.

    Args:
        folder: Of the run.
        is_requeued: Ask Slurm for another turn at SIGUSR1.
    """

    def __init__(self, folder: Path, *, is_requeued: bool = False) -> None:
        self.folder, self.is_requeued = folder, is_requeued
        self.received: int | None = None
        self._random: dict[str, Any] | None = None  # before validation, which may draw from the generators

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Around all of training: the signals are ours, and afterwards whose they were."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in STOPPING}
        try:
            self._listen()
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _listen(self) -> None:
        for number in STOPPING:
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        """Notes the first signal; nothing else may be done inside of whatever it came into."""
        if self.received is not None:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self.received = number
        name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        os.write(
            2, f"\n{name}: saving after this step; once more ends it at once.\n".encode()
        )  # print may be what was interrupted

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Takes the signals back from Lightning, whose handlers save wherever the run stands, or nothing."""
        if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) == self._receive:
            self._listen()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stops behind an optimiser step."""
        done = batch_idx + 1
        if done % trainer.accumulate_grad_batches == 0 or done >= trainer.num_training_batches:
            self._stop_if_asked(trainer)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keeps the state that training left."""
        self._random = random_states()

    def on_validation_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: object) -> None:
        """Stops within validation, which may take minutes, with the random states of before.

        Ranks may have different numbers of batches, and weight averaging has swapped the weights: such runs stop at the
        next optimiser step.
        """
        callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        is_swapped = any(isinstance(callback, WeightAveraging) for callback in callbacks)
        if trainer.world_size == 1 and not is_swapped and self.received is not None and self._random is not None:
            set_random_states(self._random)
            self._stop_if_asked(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stops before the final scoring, which may take hours; the last epoch is saved by now."""
        if self._is_asked(trainer):
            self._stop(trainer)

    def on_test_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: object) -> None:
        """Stops within the final scoring, where a resumed run begins again.

        Ranks may have different numbers of batches.
        """
        if trainer.world_size == 1 and self.received is not None:
            self._stop(trainer)

    def _stop_if_asked(self, trainer: L.Trainer) -> None:
        if self._is_asked(trainer):
            trainer.save_checkpoint(self.folder / "checkpoints" / "last.ckpt")
            self._stop(trainer)

    def _is_asked(self, trainer: L.Trainer) -> bool:
        asked = self.received is not None
        if trainer.world_size > 1:  # a signal reaches processes in different steps, or one of them alone
            asked = trainer.strategy.reduce_boolean_decision(asked, all=False)
        return asked

    def _stop(self, trainer: L.Trainer) -> NoReturn:
        number = self.received or signal.SIGTERM
        if self.is_requeued and number == _SIGUSR1 and trainer.is_global_zero:
            requeue()
        name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        raise StoppedBySignal(
            f"Stopped by {name} after step {trainer.global_step}; the same command with checkpoint=last "
            f"paths.output_dir={self.folder} goes on from there.",
            number,
        )


def requeue() -> None:
    """Puts the Slurm job of this process in the queue again, and says so; only says so where there is none."""
    array, task, job = (os.environ.get(name) for name in _JOB)
    name = f"{array}_{task}" if array and task else job
    if name is None or shutil.which("scontrol") is None:
        print("trainer.requeue=true: this is no job of Slurm, so nothing is put in a queue.", flush=True)
        return
    done = subprocess.run(["scontrol", "requeue", name], capture_output=True, text=True, check=False)
    print(
        f"Slurm job {name} is in the queue again."
        if done.returncode == 0
        else f"scontrol requeue {name}: {done.stderr.strip()}",
        flush=True,
    )
