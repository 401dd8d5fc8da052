"""`last.ckpt` and `best.ckpt`, by Lightning's callback; whole or not at all."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from vlmcap.config import Config
from vlmcap.files import replacing


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target and renames: Lightning's own writes in the system's temporary folder, and from there it may be a copy."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Saves so that `path` holds the old content or the new one, whenever the process dies."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        with replacing(target) as partial:
            if _is_full(checkpoint, partial):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))


def _is_full(checkpoint: dict[str, Any], file: Path) -> bool:
    """Saves, and says whether the disk had no room for it. The error ends here, as its frames would keep the file open, and its room."""
    try:
        torch.save(checkpoint, file)
    except RuntimeError as error:
        if "inline_container" not in str(error):  # what torch's writer says of a full disk
            raise
        return True
    return False


class StepCheckpoint(ModelCheckpoint):
    """Saves every few optimiser steps, and never between the micro-batches of one: their gradients are in no checkpoint."""

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Saves if a step is done and due."""
        done = batch_idx + 1
        if done % trainer.accumulate_grad_batches == 0 or done >= trainer.num_training_batches:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)


class StepLimit(Callback):
    """Stops after some optimiser steps. Lightning's own limit makes it lose count of epochs when such a run is resumed.

    Args:
        max_steps: In all, those before a resume included; -1 for no limit.
    """

    def __init__(self, max_steps: int) -> None:
        self.max_steps = max_steps

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stops a resumed run that has nothing left to do."""
        self._check(trainer)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: object) -> None:
        """Stops at the limit."""
        self._check(trainer)

    def _check(self, trainer: L.Trainer) -> None:
        if 0 <= self.max_steps <= trainer.global_step:
            trainer.should_stop = True


def best_checkpoint(trainer: L.Trainer) -> Path | None:
    """The best checkpoint that this run saved, or None: a file of an earlier run in the same folder is not ours."""
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.monitor and callback.best_model_path:
            return Path(callback.best_model_path)
    return None


def checkpoint_callbacks(folder: Path, config: Config) -> list[Callback]:
    """Callbacks that keep the last state, and the best one by `data.monitor`.

    The last state is saved after each epoch, and within epochs too where `trainer.checkpoint_every_n_steps` is set.

    Args:
        folder: Of the run.
        config: Names the metric.
    """
    target = folder / "checkpoints"
    common = {"dirpath": target, "enable_version_counter": False, "auto_insert_metric_name": False}
    callbacks: list[Callback] = [ModelCheckpoint(filename="last", save_top_k=1, save_on_train_epoch_end=True, **common)]  # type: ignore[arg-type]
    if config.trainer.checkpoint_every_n_steps:
        callbacks.append(
            StepCheckpoint(filename="last", save_top_k=1, every_n_train_steps=config.trainer.checkpoint_every_n_steps, **common)  # type: ignore[arg-type]
        )
    if config.data.monitor.startswith("val/"):
        callbacks.append(
            ModelCheckpoint(
                filename="best",
                monitor=config.data.monitor,
                mode=config.better(config.data.monitor),
                save_top_k=1,
                save_on_train_epoch_end=True,
                **common,  # type: ignore[arg-type]
            )
        )
    return callbacks


def settle_loop(loop: dict[str, Any], epoch: int, next_epoch: int, step: int) -> None:
    """Makes the state of Lightning's loop say where the run stands, and nothing of how it came there.

    Its own counts differ with the callback that saves: an epoch counts as done where a run stops inside it, and as not done after its last
    batch. Resumed from the latter, Lightning forgets to count the start of the next epoch, and a second resume trains an epoch too many.

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
    # torchdata's state of the loader says less, as Lightning reads it inside an epoch only, and binds a run to its number of workers.
    loop["state_dict"].pop("combined_loader", None)
