"""Captions generated in the loop, gathered over ranks, scored once over the corpus, and written down."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch.distributed as dist

from vlmcap.metrics import METRIC_NAMES
from vlmcap.metrics.diversity import collapse_warning
from vlmcap.training.callbacks.scorer import LOOP_METRICS, CaptionScorer, Prediction, write_predictions
from vlmcap.types import Batch


def gather(predictions: list[Prediction]) -> list[Prediction]:
    """The predictions of all ranks, each clip once, by id; the texts travel, never logits."""
    everyone = [predictions]
    if dist.is_available() and dist.is_initialized():
        everyone = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(everyone, predictions)
    by_id = {row.clip.id: row for rows in everyone for row in rows}
    return [by_id[name] for name in sorted(by_id)]


def gather_sums(*values: float) -> list[float]:
    """Each number summed over all ranks."""
    everyone = [values]
    if dist.is_available() and dist.is_initialized():
        everyone = [values for _ in range(dist.get_world_size())]
        dist.all_gather_object(everyone, values)
    return [sum(column) for column in zip(*everyone, strict=True)]


class CaptionEvaluation(L.Callback):
    """Scores the captions that the validation or test loop generates.

    Args:
        scorer: Of the corpus.
        folder: Where prediction files go.
        followed: Metrics such as "val/meteor" that a checkpoint or an early end follows, measured while training whatever they cost.
    """

    def __init__(self, scorer: CaptionScorer, folder: Path, followed: Sequence[str | None] = ()) -> None:
        self.scorer, self.folder = scorer, folder
        extra = {name.removeprefix("val/") for name in followed if name} & set(METRIC_NAMES) - set(LOOP_METRICS)
        self._loop_metrics = (*LOOP_METRICS, *sorted(extra))
        self._rows: list[Prediction] = []
        self._loss, self._labels = 0.0, 0
        self.split = "test"  # what the test loop runs on
        self.scores: dict[str, float] = {}
        self.predictions: list[Prediction] = []

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Keeps captions and sums of the loss."""
        if isinstance(outputs, tuple):
            self._loss += outputs[0]
            self._labels += outputs[1]
        else:
            self._keep(batch, outputs)

    def on_test_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Keeps captions."""
        self._keep(batch, outputs)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Scores the captions of the validation clips and logs under `val/`."""
        scores = self._score(self._loop_metrics, pl_module)
        loss, num_labels = gather_sums(self._loss, self._labels)
        scores["loss"] = loss / max(1, num_labels)
        self._loss, self._labels = 0.0, 0
        if trainer.sanity_checking:
            return
        self._publish(trainer, pl_module, "val", scores)
        if trainer.is_global_zero and self.predictions:
            write_predictions(self.folder / f"val-epoch={trainer.current_epoch:02d}.jsonl", self.predictions, self.scorer.tokenizer)

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Scores the whole split with every metric and logs under its name."""
        scores = self._score(None, pl_module)
        self._publish(trainer, pl_module, self.split, scores)
        if trainer.is_global_zero and self.predictions:
            write_predictions(self.folder / f"{self.split}.jsonl", self.predictions, self.scorer.tokenizer)

    def _keep(self, batch: Batch, texts: list[str]) -> None:
        self._rows += [Prediction(clip, text) for clip, text in zip(batch.clips, texts, strict=True)]

    def _score(self, metrics: Sequence[str] | None, pl_module: L.LightningModule) -> dict[str, float]:
        self.predictions, self._rows = gather(self._rows), []
        return self.scorer.score(self.predictions, metrics=metrics, device=str(pl_module.device)) if self.predictions else {}

    def _publish(self, trainer: L.Trainer, pl_module: L.LightningModule, split: str, scores: dict[str, float]) -> None:
        self.scores = {f"{split}/{name}": value for name, value in scores.items()}
        pl_module.log_dict(self.scores, logger=False, prog_bar=False, rank_zero_only=False)
        warning = collapse_warning([row.text for row in self.predictions]) if self.predictions else None
        collapsed = {f"{split}/is_collapsed": float(warning is not None)} if self.predictions else {}
        for logger in trainer.loggers:
            logger.log_metrics(self.scores | collapsed | {"epoch": trainer.current_epoch}, step=trainer.global_step)
        if warning and trainer.is_global_zero:
            print(f"Warning: {split}: {warning}", flush=True)
