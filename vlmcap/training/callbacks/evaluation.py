"""Gathers the captions of the validation and test loops over ranks, scores them as a corpus and writes them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning as L
import torch

from vlmcap.metrics import METRIC_NAMES
from vlmcap.metrics.diversity import collapse_warning
from vlmcap.metrics.torchmetrics import CaptionScore
from vlmcap.terminal import progress_reporter
from vlmcap.training.callbacks.progress import print_line
from vlmcap.training.callbacks.scorer import LOOP_METRICS, CaptionScorer, Prediction, write_predictions
from vlmcap.training.module import ValidationOutput
from vlmcap.types import Batch, Clip


def gather(captions: CaptionScore, clips: Iterable[Clip]) -> list[Prediction]:
    """Returns the captions of all ranks, each clip once, sorted by id; only texts are exchanged, never logits.

    Args:
        captions: Captions of this rank, with the ids of their clips.
        clips: All clips that may have been captioned.
    """
    with captions.sync_context():
        # The metric holds texts as tensors, which `sync_context` gathers from all ranks; ids are unique in a split.
        texts = {name: text for name, text, _ in captions.corpus()}
    return [Prediction(clip, texts[clip.id]) for clip in sorted(clips, key=lambda clip: clip.id) if clip.id in texts]


def log_scores(
    trainer: L.Trainer,
    pl_module: L.LightningModule,
    scores: Mapping[str, float],
    others: Mapping[str, float] | None = None,
) -> None:
    """Logs scores to Lightning, whose callbacks find them in `trainer.callback_metrics`, and to the loggers.

    The loggers are called directly, because Lightning counts a step only after the validation at its end and would log
    the scores under the previous step.

    Args:
        trainer: Trainer with the loggers.
        pl_module: Module whose hook is running.
        scores: Values by name, the same on each rank.
        others: Values for the loggers alone.
    """
    # float64, so that callbacks compare exactly the values that are written to files.
    values = {name: torch.tensor(value, dtype=torch.float64) for name, value in scores.items()}
    # `batch_size` is only the weight of a mean over batches, and this is logged once per epoch.
    pl_module.log_dict(values, logger=False, batch_size=1)
    for logger in trainer.loggers:
        logger.log_metrics({**scores, **(others or {}), "epoch": trainer.current_epoch}, step=trainer.global_step)


class CaptionEvaluation(L.Callback):
    """Scores the captions that the validation or test loop generates.

    Args:
        scorer: Scorer of a corpus of predictions.
        clips: Clips of each split.
        folder: Folder of the prediction files.
        monitor: Monitored metric, such as "val/meteor"; it is measured in every validation, even if it is slow.
    """

    def __init__(
        self, scorer: CaptionScorer, clips: Mapping[str, Sequence[Clip]], folder: Path, monitor: str = ""
    ) -> None:
        self.scorer, self.clips, self.folder = scorer, clips, folder
        # A slow metric such as METEOR is computed while training only if checkpoints are chosen by it.
        extra = {monitor.removeprefix("val/")} & set(METRIC_NAMES) - set(LOOP_METRICS)
        self._loop_metrics = (*LOOP_METRICS, *sorted(extra))
        self._captions = CaptionScore()  # only gathers the corpus; `scorer` computes the scores
        self._loss, self._labels = 0.0, 0
        self.split = "test"  # the split that the test loop runs on
        self.scores: dict[str, float] = {}
        self.predictions: list[Prediction] = []

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Moves the texts to the device on which the process group gathers them."""
        self._captions.to(trainer.strategy.root_device)

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Collects captions and the loss of a batch."""
        assert isinstance(outputs, ValidationOutput)
        self._loss += outputs.loss
        self._labels += outputs.num_labels
        if outputs.captions:
            self._keep(batch.prompts, outputs.captions)

    def on_test_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Collects the captions of a batch."""
        self._keep(batch, outputs)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Scores the captions of the validation clips and logs the scores under `val/`."""
        scores = self._score("val", self._loop_metrics, pl_module)
        # The loss is read before the return, so that its sums are empty for the next validation.
        scores["loss"] = self._mean_loss(trainer)
        if trainer.sanity_checking:
            return
        self._publish(trainer, pl_module, "val", scores)
        if trainer.is_global_zero and self.predictions:
            write_predictions(
                self.folder / f"val-epoch={trainer.current_epoch:02d}.jsonl", self.predictions, self.scorer.tokenizer
            )

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Scores the full split with every metric and logs the scores under its name."""
        scores = self._score(self.split, None, pl_module)
        self._publish(trainer, pl_module, self.split, scores)
        if trainer.is_global_zero and self.predictions:
            write_predictions(self.folder / f"{self.split}.jsonl", self.predictions, self.scorer.tokenizer)

    def _keep(self, batch: Batch, texts: list[str]) -> None:
        self._captions.update(texts, [clip.captions for clip in batch.clips], [clip.id for clip in batch.clips])

    def _score(self, split: str, metrics: Sequence[str] | None, pl_module: L.LightningModule) -> dict[str, float]:
        self.predictions = gather(self._captions, self.clips[split])
        self._captions.reset()
        if not self.predictions:
            return {}
        with progress_reporter(f"scoring the {split} split") if pl_module.trainer.is_global_zero else nullcontext():
            return self.scorer.score(self.predictions, metrics=metrics, device=str(pl_module.device))

    def _mean_loss(self, trainer: L.Trainer) -> float:
        """Returns the mean loss in nats over the label tokens of all ranks since the last call."""
        sums = torch.tensor([self._loss, self._labels], dtype=torch.float64)
        self._loss, self._labels = 0.0, 0
        if trainer.world_size > 1:
            sums = trainer.strategy.reduce(sums.to(trainer.strategy.root_device), reduce_op="sum")
        loss, num_labels = sums.tolist()
        return float(loss) / max(1, int(num_labels))

    def _publish(self, trainer: L.Trainer, pl_module: L.LightningModule, split: str, scores: dict[str, float]) -> None:
        # "val/cider", "test/cider", …
        self.scores = {f"{split}/{name}": value for name, value in scores.items()}
        warning = collapse_warning([prediction.text for prediction in self.predictions]) if self.predictions else None
        # Logged, but kept out of the summary's scores.
        collapsed = {f"{split}/is_collapsed": float(warning is not None)} if self.predictions else {}
        log_scores(trainer, pl_module, self.scores, collapsed)
        if warning and trainer.is_global_zero:
            print_line(trainer, f"Warning: {split}: {warning}")
