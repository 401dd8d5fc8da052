"""Writes `last.ckpt` and `best.ckpt` atomically at the end of an epoch, and corrects the loop state in them."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import Callback, Checkpoint
from lightning.pytorch.trainer.states import TrainerFn

from vlmcap.config import Config
from vlmcap.files import replacing
from vlmcap.training.callbacks.choosing import Choice, Score
from vlmcap.training.loggers.jsonl import JsonlLogger


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its target and renames it.

    Lightning writes to the temporary folder of the system, from which a rename may become a copy.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Saves a checkpoint so that `path` always holds either the old or the new content, even after a crash."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        with replacing(target) as partial:
            # Raised inside of `replacing`, which then removes the partial file and keeps the old checkpoint.
            if _runs_out_of_space(checkpoint, partial):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))


def _runs_out_of_space(checkpoint: dict[str, Any], file: Path) -> bool:
    """Saves a checkpoint, and returns whether the disk is full.

    The error is not re-raised, because the frames of its traceback would keep the file open and the space taken.
    """
    try:
        torch.save(checkpoint, file)
    except RuntimeError as error:
        if "inline_container" not in str(error):  # torch's writer reports a full disk by this name
            raise
        return True
    return False


class RunCheckpoints(Checkpoint):
    """Keeps the last state of a run and the best one by a metric.

    Both are written at the end of an epoch, after all callbacks have seen its validation. The best state is written
    first, so that `last.ckpt` never refers to an outdated `best.ckpt`; a resumed run reads the best score from
    `best.ckpt` itself. Within an epoch, the last state is also saved every few optimiser steps, but never between the
    micro-batches of one step, because checkpoints hold no gradients.

    Args:
        folder: Run folder.
        monitor: Metric of the best checkpoint, such as "val/cider"; None keeps no best checkpoint.
        mode: "min" if lower values are better, "max" if higher values are.
        every_n_steps: Optimiser steps between saves within an epoch; 0 saves only at the end of epochs.
    """

    filename = "best"

    def __init__(self, folder: Path, *, monitor: str | None, mode: str = "max", every_n_steps: int = 0) -> None:
        self.folder, self.monitor, self.mode, self.every_n_steps = folder / "checkpoints", monitor, mode, every_n_steps
        self.best: Score | None = None
        self._choice = None if monitor is None else Choice("best.ckpt", monitor, mode)
        self._is_resumed = self._is_validated = False
        self._saved_step = 0

    @property
    def last_path(self) -> Path:
        """The checkpoint that a run resumes from."""
        return self.folder / "last.ckpt"

    @property
    def best_path(self) -> Path:
        """The best checkpoint; it belongs to this run if `best` is not None."""
        return self.folder / f"{self.filename}.ckpt"

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Removes the checkpoints of an earlier run in this folder, which a new run must neither resume nor score."""
        # Removed at the start of training and not before, so that a run that fails while loading leaves the old files.
        if not self._is_resumed and trainer.is_global_zero:
            self.last_path.unlink(missing_ok=True)
            self.best_path.unlink(missing_ok=True)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Saves the last state if an optimiser step is complete and a save is due."""
        done, step = batch_idx + 1, trainer.global_step
        is_step_done = done % trainer.accumulate_grad_batches == 0 or done >= trainer.num_training_batches
        # `global_step` stays the same during the micro-batches of the next step, which must not save again.
        if self.every_n_steps and is_step_done and step % self.every_n_steps == 0 and step != self._saved_step:
            self._save_last(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Records that the metrics belong to the current weights."""
        self._is_validated = trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Saves the best state if this one is better, and then the last state."""
        if self._is_validated and self._choice is not None:
            score = Score.of(trainer, self.monitor)
            # The first rank decides for all, because saving needs every rank.
            if trainer.strategy.broadcast(self._choice.is_better(score, self.best)):
                # Set before the save, as the checkpoint holds the state of this callback.
                self.best = score
                trainer.save_checkpoint(self.best_path)
        # An epoch without a validation would otherwise be judged by the metrics of an earlier one.
        self._is_validated = False
        self._save_last(trainer)

    def _save_last(self, trainer: L.Trainer) -> None:
        self._saved_step = trainer.global_step
        trainer.save_checkpoint(self.last_path)

    def state_dict(self) -> dict[str, Any]:
        """Returns the score of the best checkpoint."""
        return {"best": None if self.best is None else self.best.plain()}

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Adds the number of lines in `metrics.jsonl`."""
        counts = [logger.num_lines for logger in trainer.loggers if isinstance(logger, JsonlLogger)]
        checkpoint["callbacks"][self.state_key]["num_lines"] = counts[0] if counts else None

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Reads the score of `best.ckpt`, and drops the lines of `metrics.jsonl` that this run will write again."""
        # 1. Find the best score: in this folder, or in that of the run that this one continues.
        self._is_resumed, self._saved_step = True, int(checkpoint["global_step"])
        source = Path(str(trainer.ckpt_path)).resolve().parent
        is_here, best = source == self.folder.resolve(), source / self.best_path.name
        # The score in `best.ckpt` itself, as `last.ckpt` may be older than it.
        best_score = _read_best_score(best) if self.monitor is not None and best.is_file() else None
        if best_score is not None and best_score.step > self._saved_step:
            if not is_here:
                best_score = None  # from steps of the other run that this run does not continue
            elif trainer.is_global_zero:
                print(
                    f"best.ckpt is from step {best_score.step}, after this checkpoint; it is kept until a validation "
                    "is better."
                )
        self.best = trainer.strategy.broadcast(best_score)
        if not trainer.is_global_zero:
            return
        # 2. Bring the files of this folder to the state of the checkpoint.
        if not is_here:
            self.best_path.unlink(missing_ok=True)  # left by another run
        if not is_here and self.best is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            with replacing(self.best_path) as partial:
                # A run in a new folder continues another one, and its best state may remain the best.
                shutil.copyfile(best, partial)
        num_lines = checkpoint["callbacks"].get(self.state_key, {}).get("num_lines")
        # Lines after the checkpoint's step are dropped, because the resumed run logs these steps again.
        for logger in trainer.loggers:
            if is_here and num_lines is not None and isinstance(logger, JsonlLogger):
                logger.truncate_to(num_lines)


def _read_best_score(path: Path) -> Score | None:
    """Returns the score that is saved in a best checkpoint."""
    content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    held = content.get("callbacks", {}).get(RunCheckpoints.__qualname__, {}).get("best")
    return None if held is None else Score(**held)


class StepLimit(Callback):
    """Stops after a number of optimiser steps.

    Lightning's own `max_steps` makes it lose count of epochs when such a run is resumed.

    Args:
        max_steps: Optimiser steps in total, including those before a resume; -1 for no limit.
    """

    def __init__(self, max_steps: int) -> None:
        self.max_steps = max_steps

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stops a resumed run that has no step left, unless a validation is pending."""
        if not getattr(pl_module, "needs_validation", False):
            self._check(trainer)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: object) -> None:
        """Stops at the limit."""
        self._check(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stops after a validation that the interrupted run had left."""
        self._check(trainer)

    def _check(self, trainer: L.Trainer) -> None:
        if 0 <= self.max_steps <= trainer.global_step:
            trainer.should_stop = True


def run_checkpoints(trainer: L.Trainer) -> RunCheckpoints:
    """Returns the callback that keeps the checkpoints of a training run."""
    return next(callback for callback in trainer.checkpoint_callbacks if isinstance(callback, RunCheckpoints))


def checkpoint_callbacks(folder: Path, config: Config) -> list[Callback]:
    """Builds the callback that keeps the last state and the best one by `monitor`.

    Args:
        folder: Run folder.
        config: Run configuration, with the monitored metric.
    """
    every_n_steps = config.trainer.checkpoint_every_n_steps or 0
    return [RunCheckpoints(folder, monitor=config.monitor, mode=config.monitor_mode, every_n_steps=every_n_steps)]


def normalize_loop_state(loop: dict[str, Any], epoch: int, next_epoch: int, step: int) -> None:
    """Sets the state of Lightning's loop to the position of the run, independent of the hook that saves.

    Lightning's own counts depend on the hook: an epoch counts as complete if a run stops inside it, and as incomplete
    after its last batch. After resuming from the latter, Lightning does not count the start of the next epoch, so a
    second resume would train one epoch too many.

    Args:
        loop: State of the fit loop, changed in place.
        epoch: Epoch of the last batch.
        next_epoch: Epoch of the next batch.
        step: Optimiser steps done.
    """
    # `total` and `current` count epochs from 1; `processed` is the number of finished ones.
    for count in loop["epoch_progress"].values():
        count.update(ready=epoch + 1, started=epoch + 1, processed=next_epoch, completed=next_epoch)
    # The checkpoint is from the end of an epoch: its last batch counts as completed.
    if next_epoch > epoch:
        batches = loop["epoch_loop.batch_progress"]
        for count in (batches["total"], batches["current"]):
            count["completed"] = count["processed"]
        loop["epoch_loop.state_dict"]["_batches_that_stepped"] = step
    # The loader state of torchdata is not needed: Lightning reads it only inside an epoch, and it ties a run to its
    # number of workers.
    loop["state_dict"].pop("combined_loader", None)


def request_validation(loop: dict[str, Any], epoch: int, step: int) -> None:
    """Changes the state of `normalize_loop_state` so that a trained epoch is validated again.

    Args:
        loop: State of the fit loop, changed in place.
        epoch: Epoch whose validation is missing.
        step: Optimiser steps done.
    """
    for count in loop["epoch_progress"].values():
        count.update(ready=epoch + 1, started=epoch + 1, processed=epoch, completed=epoch)
    validation = loop["epoch_loop.val_loop.batch_progress"]
    # One validation was started and has not ended.
    validation["total"].update(ready=1, started=1, processed=0, completed=0)
    validation["current"].update(ready=0, started=0, processed=0, completed=0)
    # Lightning counts the last step of an epoch only after its validation.
    loop["epoch_loop.state_dict"]["_batches_that_stepped"] = step - 1
