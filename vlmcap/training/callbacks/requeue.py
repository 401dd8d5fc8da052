"""Stops a run at a signal: SIGTERM from Slurm or a spot instance, SIGUSR1 from Slurm, or Ctrl-C."""

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
STOP_SIGNALS = tuple(number for number in (signal.SIGTERM, _SIGUSR1, signal.SIGINT) if number is not None)
_JOB = ("SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_JOB_ID")


class StopOnSignal(L.Callback):
    """Saves `last.ckpt` at the end of the optimiser step in which a signal arrives, and stops the run.

    During gradient accumulation it waits for the end of the step, because checkpoints hold no gradients. During
    validation it stops at the next batch with the state of the last step, and the resumed run repeats the validation.
    After the last validation the state is saved already, so the run stops before the final scoring, or at its next
    batch. A second signal ends the process immediately.

    Args:
        folder: Run folder.
        is_requeued: Whether to requeue the Slurm job at SIGUSR1.
    """

    def __init__(self, folder: Path, *, is_requeued: bool = False) -> None:
        self.folder, self.is_requeued = folder, is_requeued
        self.received: int | None = None
        self._random: dict[str, Any] | None = None  # states before validation, which may draw random numbers

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handles the signals inside the context, and restores the earlier handlers after it."""
        # Python allows signal handlers in the main thread only.
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
        try:
            self._install_handlers()
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _install_handlers(self) -> None:
        for number in STOP_SIGNALS:
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        """Records the first signal; a handler must do nothing else, as it may interrupt any code."""
        if self.received is not None:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            # The default action of the second signal ends the process, whatever it does at the moment.
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self.received = number
        name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        # Not print, which may be what was interrupted.
        os.write(2, f"\n{name}: saving after this step; send it again to stop immediately.\n".encode())

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Reinstalls the handlers over Lightning's, which save at any point of a step or not at all."""
        if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) == self._receive:
            self._install_handlers()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stops after an optimiser step."""
        done = batch_idx + 1
        # Only at the end of an optimiser step; the last one of an epoch may have fewer micro-batches.
        if done % trainer.accumulate_grad_batches == 0 or done >= trainer.num_training_batches:
            self._stop_if_requested(trainer)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keeps the random states at the end of training."""
        self._random = random_states()

    def on_validation_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: object) -> None:
        """Stops during validation, which may take minutes, with the random states from before it.

        Runs with several ranks, which may have different numbers of batches, and with weight averaging, which has
        swapped the weights, stop at the next optimiser step instead.
        """
        callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        # During validation, WeightAveraging has the averaged weights in the model, which must not become the state of
        # training.
        is_swapped = any(isinstance(callback, WeightAveraging) for callback in callbacks)
        if trainer.world_size == 1 and not is_swapped and self.received is not None and self._random is not None:
            # Captions of this validation may have drawn random numbers, which the resumed validation draws again.
            set_random_states(self._random)
            self._stop_if_requested(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stops before the final scoring, which may take hours; the last epoch is saved already."""
        if self._is_stop_requested(trainer):
            self._stop(trainer)

    def on_test_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: object) -> None:
        """Stops during the final scoring, which a resumed run repeats.

        Several ranks may have different numbers of batches, so only a single process stops here.
        """
        if trainer.world_size == 1 and self.received is not None:
            self._stop(trainer)

    def _stop_if_requested(self, trainer: L.Trainer) -> None:
        if self._is_stop_requested(trainer):
            # `last.ckpt` is complete before Slurm is asked to start the job again.
            trainer.save_checkpoint(self.folder / "checkpoints" / "last.ckpt")
            self._stop(trainer)

    def _is_stop_requested(self, trainer: L.Trainer) -> bool:
        is_requested = self.received is not None
        if trainer.world_size > 1:  # a signal may reach processes in different steps, or only one of them
            is_requested = trainer.strategy.reduce_boolean_decision(is_requested, all=False)
        return is_requested

    def _stop(self, trainer: L.Trainer) -> NoReturn:
        number = self.received or signal.SIGTERM
        if self.is_requeued and number == _SIGUSR1 and trainer.is_global_zero:
            requeue()
        name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        raise StoppedBySignal(
            f"Stopped by {name} after step {trainer.global_step}; to continue, run the same command with "
            f"checkpoint=last paths.output_dir={self.folder}.",
            number,
        )


def requeue() -> None:
    """Requeues the Slurm job of this process, and prints the result."""
    # A task of a job array is named "<array>_<index>".
    array, task, job = (os.environ.get(name) for name in _JOB)
    name = f"{array}_{task}" if array and task else job
    if name is None or shutil.which("scontrol") is None:
        print("trainer.requeue=true: this is not a Slurm job, so it is not requeued.", flush=True)
        return
    done = subprocess.run(["scontrol", "requeue", name], capture_output=True, text=True, check=False)
    print(
        f"Slurm job {name} was requeued."
        if done.returncode == 0
        else f"scontrol requeue {name}: {done.stderr.strip()}",
        flush=True,
    )
