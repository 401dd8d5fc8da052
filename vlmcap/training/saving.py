"""`last.ckpt` and `best.ckpt`, by Lightning's callback."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from vlmcap.config import Config


def checkpoint_callbacks(folder: Path, config: Config) -> list[Callback]:
    """Callbacks that keep the last state, and the best one by `objective`.

    The last state is saved after each epoch, and within epochs too where `trainer.checkpoint_every_n_steps` is set.

    Args:
        folder: Of the run.
        config: Names the objective.
    """
    target = folder / "checkpoints"
    common = {"dirpath": target, "enable_version_counter": False, "auto_insert_metric_name": False}
    callbacks: list[Callback] = [ModelCheckpoint(filename="last", save_top_k=1, save_on_train_epoch_end=True, **common)]  # type: ignore[arg-type]
    if config.trainer.checkpoint_every_n_steps:
        callbacks.append(
            ModelCheckpoint(filename="last", save_top_k=1, every_n_train_steps=config.trainer.checkpoint_every_n_steps, **common)  # type: ignore[arg-type]
        )
    if config.objective.startswith("val/"):
        callbacks.append(
            ModelCheckpoint(
                filename="best",
                monitor=config.objective,
                mode=config.objective_mode,
                save_top_k=1,
                save_on_train_epoch_end=True,
                **common,  # type: ignore[arg-type]
            )
        )
    return callbacks
