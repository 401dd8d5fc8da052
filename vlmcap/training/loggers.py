"""Where metrics go: `metrics.jsonl` always, and CSV or Weights & Biases beside it."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from vlmcap.config import Config, LoggerKind
from vlmcap.data.decoding.video import VideoError, decode_frames
from vlmcap.files import replacing
from vlmcap.training.evaluation import CaptionEvaluation
from vlmcap.training.scorer import Prediction


class JsonlLogger(Logger):
    """Appends one object a log step to a file: `step`, `epoch`, and the metrics.

    Args:
        path: The file; its folder must exist.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    @property
    def name(self) -> str:
        """The file's stem."""
        return self.path.stem

    @property
    def version(self) -> str:
        """Nothing is versioned: a run folder is one run."""
        return ""

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Nothing: `config.yaml` has them."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """One line; the write is one call, so that a kill tears at most the last line."""
        values = dict(metrics)
        epoch = values.pop("epoch", None)
        record = {"step": step, "epoch": None if epoch is None else int(epoch), **{name: float(value) for name, value in values.items()}}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def cut_after(self, step: int) -> None:
        """Drops lines of later steps than `step`, and a torn last one: a resumed run writes them again."""
        if not self.path.is_file():
            return
        kept = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line)
            except (ValueError, KeyError, TypeError):
                continue
        with replacing(self.path) as partial:
            partial.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")


def make_loggers(config: Config, plain: Mapping[str, Any], folder: Path, step: int | None) -> list[Logger]:
    """The loggers of a run.

    Args:
        config: Names the kind.
        plain: The resolved configuration as plain data.
        folder: Of the run.
        step: Of the checkpoint that the run resumes from; later lines of `metrics.jsonl` are dropped.
    """
    jsonl = JsonlLogger(folder / "metrics.jsonl")
    if rank_zero_only.rank == 0:  # type: ignore[attr-defined]
        jsonl.cut_after(step if step is not None else -1)
    if config.logger.kind is LoggerKind.wandb:
        return [jsonl, _wandb_logger(config, plain, folder)]
    return [jsonl, CSVLogger(folder, name="", version="", prefix="")]


def _wandb_logger(config: Config, plain: Mapping[str, Any], folder: Path) -> Logger:
    """Runs group by encoder and language model, or by whole model, without a click: group, tags and flat config keys say what differs."""
    reason = _offline_reason(config.logger.offline)
    if reason:
        print(f"W&B: offline, {reason}; `wandb sync {folder / 'wandb'}/offline-run-*` uploads the run later.", flush=True)
    parts = config.part_names
    return WandbLogger(
        project=config.logger.project,
        save_dir=folder,
        offline=bool(reason),
        name="-".join([*parts.values(), config.tuning.name, f"s{config.seed}"]),
        group="+".join(name for group, name in parts.items() if group != "projector"),
        job_type="train",
        tags=[
            *(f"{group}={name}" for group, name in parts.items()),
            f"tuning={config.tuning.name}",
            f"hardware={config.hardware.name}",
        ],
        config=dict(plain),
    )


def _offline_reason(is_asked: bool) -> str | None:
    """Why W&B goes offline, or None when it can be reached."""
    if is_asked:
        return "as logger.offline says"
    if os.environ.get("WANDB_MODE") in ("offline", "disabled"):
        return f"as WANDB_MODE={os.environ['WANDB_MODE']} says"
    import wandb

    settings = wandb.Settings()
    if not (os.environ.get("WANDB_API_KEY") or wandb.api.api_key):
        return "as there is no API key (`wandb login` makes one)"
    host = str(settings.base_url).split("//")[-1].split("/")[0]
    name, _, port = host.partition(":")
    try:
        socket.create_connection((name, int(port or 443)), timeout=3).close()
    except OSError:
        return f"as {name} cannot be reached"
    return None


class WandbTable(L.Callback):
    """Sends a table of clips with thumbnails, predictions and references to W&B after each validation.

    Args:
        evaluation: Holds the predictions.
        num_rows: Of the table; the same clips each time.
    """

    def __init__(self, evaluation: CaptionEvaluation, num_rows: int) -> None:
        self.evaluation, self.num_rows = evaluation, num_rows

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Logs the table."""
        self._send(trainer, "val/captions")

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Logs the table."""
        self._send(trainer, f"{self.evaluation.split}/captions")

    def _send(self, trainer: L.Trainer, key: str) -> None:
        if trainer.sanity_checking or not trainer.is_global_zero:
            return
        rows = self.evaluation.predictions[: self.num_rows]
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger) and rows:
                columns = ["id", "frames", "prediction", "reference"]
                logger.log_table(key, columns=columns, data=_table_rows(rows), step=trainer.global_step)


def _table_rows(rows: Sequence[Prediction]) -> list[list[Any]]:
    import wandb

    table = []
    for row in rows:
        try:
            frames = decode_frames(row.clip.video, 4)
            strip = frames.permute(2, 0, 3, 1).flatten(1, 2).numpy()  # (H, 4 W, 3)
            image = wandb.Image(strip)
        except VideoError:
            image = None
        table.append([row.clip.id, image, row.text, row.clip.captions[0]])
    return table
