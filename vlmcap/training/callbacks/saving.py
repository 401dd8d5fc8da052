"""`last.ckpt` and `best.ckpt`, written at one point of an epoch; whole or not at all."""

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
    """Writes beside the target and renames.

    Lightning's own writes in the system's temporary folder, and from there it may be a copy.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Saves so that `path` holds the old content or the new one, whenever the process dies."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        with replacing(target) as partial:
            if _is_full(checkpoint, partial):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))


def _is_full(checkpoint: dict[str, Any], file: Path) -> bool:
    """Saves, and says whether the disk had no room for it.

    The error ends here, as its frames would keep the file open, and its room.
    """
    try:
        torch.save(checkpoint, file)
    except RuntimeError as error:
        if "inline_container" not in str(error):  # what torch's writer says of a full disk
            raise
        return True
    return False


class RunCheckpoints(Checkpoint):
    """Keeps the last state of a run, and the best one by a metric.

    Both are written at the end of an epoch, when all callbacks have heard of its validation: the best state first, and
    then the last one, so that no state says of the best one what is no longer true. The score of `best.ckpt` is read
    from that file when a run resumes. Within epochs, the last state is also saved every few optimiser steps, and never
    between the micro-batches of one step, whose gradients are in no checkpoint.

    Args:
        folder: Run folder.
        monitor: Metric that the best checkpoint follows, such as "val/cider"; None keeps no best checkpoint.
        mode: "min" or "max", whichever is better.
        every_n_steps: Optimiser steps between saves within an epoch; 0 saves at the end of epochs only.
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
        """The best checkpoint; it is this run's where `best` is not None."""
        return self.folder / f"{self.filename}.ckpt"

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Removes the checkpoints of an earlier run in this folder, which a fresh run must neither resume nor score."""
        if not self._is_resumed and trainer.is_global_zero:
            self.last_path.unlink(missing_ok=True)
            self.best_path.unlink(missing_ok=True)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Saves the last state if a step is done and due."""
        done, step = batch_idx + 1, trainer.global_step
        is_step_done = done % trainer.accumulate_grad_batches == 0 or done >= trainer.num_training_batches
        if self.every_n_steps and is_step_done and step % self.every_n_steps == 0 and step != self._saved_step:
            self._save_last(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Notes that the metrics are of the weights as they are."""
        self._is_validated = trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Saves the best state if this one is better, and then the last one."""
        if self._is_validated and self._choice is not None:
            score = Score.of(trainer, self.monitor)
            if trainer.strategy.broadcast(self._choice.is_better(score, self.best)):
                self.best = score
                trainer.save_checkpoint(self.best_path)
        self._is_validated = False
        self._save_last(trainer)

    def _save_last(self, trainer: L.Trainer) -> None:
        self._saved_step = trainer.global_step
        trainer.save_checkpoint(self.last_path)

    def state_dict(self) -> dict[str, Any]:
        """The score of the best checkpoint, which its own file must hold."""
        return {"best": None if self.best is None else self.best.plain()}

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Adds how many lines of `metrics.jsonl` are of before."""
        rows = [logger.num_rows for logger in trainer.loggers if isinstance(logger, JsonlLogger)]
        checkpoint["callbacks"][self.state_key]["rows"] = rows[0] if rows else None

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Finds out what `best.ckpt` holds, and drops the lines of `metrics.jsonl` that this run will write again."""
        self._is_resumed, self._saved_step = True, int(checkpoint["global_step"])
        source = Path(str(trainer.ckpt_path)).resolve().parent
        is_here, best = source == self.folder.resolve(), source / self.best_path.name
        found = _best_of(best) if self.monitor is not None and best.is_file() else None
        if found is not None and found.step > self._saved_step:
            if not is_here:
                found = None  # of a run that this one branches off from
            elif trainer.is_global_zero:
                print(
                    f"best.ckpt is of step {found.step}, later than this checkpoint; it stays until a validation is "
                    "better."
                )
        self.best = trainer.strategy.broadcast(found)
        if not trainer.is_global_zero:
            return
        if not is_here:
            self.best_path.unlink(missing_ok=True)  # of another run
        if not is_here and self.best is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            with replacing(self.best_path) as partial:
                shutil.copyfile(best, partial)
        rows = checkpoint["callbacks"].get(self.state_key, {}).get("rows")
        for logger in trainer.loggers:
            if is_here and rows is not None and isinstance(logger, JsonlLogger):
                logger.cut_to(rows)


def _best_of(path: Path) -> Score | None:
    """The score that a best checkpoint says it has."""
    content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    held = content.get("callbacks", {}).get(RunCheckpoints.__qualname__, {}).get("best")
    return None if held is None else Score(**held)


class StepLimit(Callback):
    """Stops after some optimiser steps. Lightning's own limit makes it lose count of epochs when such a run is resumed.

    Args:
        max_steps: In all, those before a resume included; -1 for no limit.
    """

    def __init__(self, max_steps: int) -> None:
        self.max_steps = max_steps

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stops a resumed run that has nothing left to do but, perhaps, a validation."""
        if not getattr(pl_module, "owes_validation", False):
            self._check(trainer)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: object) -> None:
        """Stops at the limit."""
        self._check(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stops behind a validation that was left of the run before."""
        self._check(trainer)

    def _check(self, trainer: L.Trainer) -> None:
        if 0 <= self.max_steps <= trainer.global_step:
            trainer.should_stop = True


def run_checkpoints(trainer: L.Trainer) -> RunCheckpoints:
    """The callback of a training run that keeps its checkpoints."""
    return next(callback for callback in trainer.checkpoint_callbacks if isinstance(callback, RunCheckpoints))


def checkpoint_callbacks(folder: Path, config: Config) -> list[Callback]:
    """The callback that keeps the last state, and the best one by `monitor`.

    Args:
        folder: Run folder.
        config: Names the metric.
    """
    every_n_steps = config.trainer.checkpoint_every_n_steps or 0
    return [RunCheckpoints(folder, monitor=config.monitor, mode=config.monitor_mode, every_n_steps=every_n_steps)]


def settle_loop(loop: dict[str, Any], epoch: int, next_epoch: int, step: int) -> None:
    """Makes the state of Lightning's loop say where the run stands, and nothing of how it came there.

    Its own counts differ with the callback that saves: an epoch counts as done where a run stops inside it, and as not
    done after its last batch. Resumed from the latter, Lightning forgets to count the start of the next epoch, and a
    second resume trains an epoch too many.

    Args:
        loop: The state, changed in place.
        epoch: The epoch of the last batch.
        next_epoch: That of the batch to come.
        step: Optimiser steps done.
    """
    for count in loop["epoch_progress"].values():
        count.update(ready=epoch + 1, started=epoch + 1, processed=next_epoch, completed=next_epoch)
    if next_epoch > epoch:
        batches = loop["epoch_loop.batch_progress"]
        for count in (batches["total"], batches["current"]):
            count["completed"] = count["processed"]
        loop["epoch_loop.state_dict"]["_batches_that_stepped"] = step
    # torchdata's state of the loader says less, as Lightning reads it inside an epoch only, and binds a run to its
    # number of workers.
    loop["state_dict"].pop("combined_loader", None)


def reopen_epoch(loop: dict[str, Any], epoch: int, step: int) -> None:
    """Makes the state that `settle_loop` left say that an epoch is trained and that its validation is to be repeated.

    Args:
        loop: The state, changed in place.
        epoch: The epoch whose validation is missing.
        step: Optimiser steps done.
    """
    for count in loop["epoch_progress"].values():
        count.update(ready=epoch + 1, started=epoch + 1, processed=epoch, completed=epoch)
    validation = loop["epoch_loop.val_loop.batch_progress"]
    validation["total"].update(ready=1, started=1, processed=0, completed=0)
    validation["current"].update(ready=0, started=0, processed=0, completed=0)
    # Lightning counts the last step of an epoch after the validation behind it.
    loop["epoch_loop.state_dict"]["_batches_that_stepped"] = step - 1
