"""Logs tables of clips with thumbnails to W&B, up to a maximum size."""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.loggers import WandbLogger

from vlmcap.config import WandbConfig
from vlmcap.config.names import VAL_TABLE
from vlmcap.data.decoding.video import VideoError, decode_frames
from vlmcap.training.callbacks.evaluation import CaptionEvaluation
from vlmcap.training.callbacks.scorer import Prediction

COLUMNS = ("id", "frames", "prediction", "reference")
NUM_FRAMES = 4  # frames in a thumbnail


class WandbTable(L.Callback):
    """Logs a table of clips with thumbnails, predictions and references to W&B after validations and at the end.

    Args:
        evaluation: Callback that holds the predictions.
        config: Number of rows, size and quality of thumbnails, frequency, and maximum MiB per run.
    """

    def __init__(self, evaluation: CaptionEvaluation, config: WandbConfig) -> None:
        self.evaluation, self.config = evaluation, config
        self.sent_bytes = 0
        self._thumbnails: dict[str, bytes | None] = {}
        self._validations = 0
        self._is_full = False

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Logs the table if it is due."""
        if not trainer.sanity_checking:
            self._validations += 1
            # The first validation always sends a table.
            if (self._validations - 1) % self.config.table_every_n_validations == 0:
                self._send(trainer, VAL_TABLE)

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Logs the table."""
        self._send(trainer, f"{self.evaluation.split}/captions")

    def _send(self, trainer: L.Trainer, key: str) -> None:
        loggers = [logger for logger in trainer.loggers if isinstance(logger, WandbLogger)]
        rows = self.evaluation.predictions[: self.config.num_table_rows]
        if not loggers or not rows or not trainer.is_global_zero:
            return
        size = self._size(rows)
        # The limit is for the whole run, because every table uploads its pictures again.
        if self.sent_bytes + size > self.config.max_media_mib * 2**20:
            if not self._is_full:
                print(
                    "W&B: no more tables of captions are uploaded, because the limit "
                    f"logger.max_media_mib={self.config.max_media_mib} is reached.",
                    flush=True,
                )
            self._is_full = True
            return
        self.sent_bytes += size
        with tempfile.TemporaryDirectory(prefix="vlmcap-") as folder:
            table = self._table(rows, Path(folder))
            for logger in loggers:
                logger.log_table(key, columns=list(COLUMNS), data=table, step=trainer.global_step)

    def _size(self, rows: Sequence[Prediction]) -> int:
        """Returns the bytes of thumbnails and texts; W&B adds some hundred bytes per row."""
        # 512 bytes stand for what W&B adds to a row.
        texts = sum(len(json.dumps([row.clip.id, row.text, row.clip.captions[0]])) + 512 for row in rows)
        return texts + sum(len(self._thumbnail(row) or b"") for row in rows)

    def _table(self, rows: Sequence[Prediction], folder: Path) -> list[list[Any]]:
        import wandb

        table = []
        for index, row in enumerate(rows):
            # A JPEG file of our own, because `wandb.Image` would write an array as a PNG of many times the size.
            jpeg, image = self._thumbnail(row), None
            if jpeg is not None:
                file = folder / f"{index}.jpg"
                file.write_bytes(jpeg)
                image = wandb.Image(str(file))
            table.append([row.clip.id, image, row.text, row.clip.captions[0]])
        return table

    def _thumbnail(self, row: Prediction) -> bytes | None:
        """Returns frames side by side as JPEG, or None if the video cannot be read; cached per clip."""
        if row.clip.id not in self._thumbnails:
            self._thumbnails[row.clip.id] = _strip(
                row.clip.video, self.config.thumbnail_height, self.config.jpeg_quality
            )
        return self._thumbnails[row.clip.id]


def _strip(video: str, height: int, quality: int) -> bytes | None:
    from PIL import Image

    try:
        frames = decode_frames(video, NUM_FRAMES)  # (4, 3, H, W)
    except VideoError:
        return None
    strip = Image.fromarray(frames.permute(2, 0, 3, 1).flatten(1, 2).numpy())  # (H, 4 W, 3)
    # Smaller videos keep their size.
    scale = min(1.0, height / strip.height)
    small = strip.resize(
        (max(1, round(strip.width * scale)), max(1, round(strip.height * scale))), Image.Resampling.LANCZOS
    )
    target = io.BytesIO()
    small.save(target, format="JPEG", quality=quality)
    return target.getvalue()
