"""Settings of the loggers, one dataclass per kind; `metrics.jsonl` is always written as well."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from omegaconf import MISSING

from vlmcap.config.checks import only_with, require, require_positive
from vlmcap.config.kinds import register

LoggedCheckpoint = Enum("LoggedCheckpoint", {"best": "best", "last": "last", "none": "none"})
LoggedCheckpoint.__doc__ = "Which checkpoint is uploaded to W&B at the end of a run."


@dataclass
class LoggerConfig:
    """Logger of metrics, in addition to `metrics.jsonl`."""

    kind: str = MISSING  # kind of logger, which selects the schema


@register("logger")
@dataclass
class NoLoggerConfig(LoggerConfig):
    """No logger besides `metrics.jsonl`."""

    kind: str = "none"  # kind of logger


@register("logger")
@dataclass
class CsvConfig(LoggerConfig):
    """`metrics.csv`."""

    kind: str = "csv"  # kind of logger


@register("logger")
@dataclass
class TensorboardConfig(LoggerConfig):
    """TensorBoard event files."""

    kind: str = "tensorboard"  # kind of logger


@register("logger")
@dataclass
class MlflowConfig(LoggerConfig):
    """MLflow."""

    kind: str = "mlflow"  # kind of logger
    project: str = "vlmcap"  # MLflow experiment


@register("logger")
@dataclass
class TrackioConfig(LoggerConfig):
    """trackio."""

    kind: str = "trackio"  # kind of logger
    project: str = "vlmcap"  # trackio project
    group: str | None = None  # group of runs; null is named after the encoder and the language model


@register("logger")
@dataclass
class WandbConfig(LoggerConfig):
    """Weights & Biases, with limits for checkpoints and media."""

    kind: str = "wandb"  # kind of logger
    project: str = "vlmcap"  # W&B project
    entity: str | None = None  # user or team; null is the default of the API key
    group: str | None = None  # group of runs; null is named after the encoder and the language model
    offline: bool = False  # write files for `wandb sync` and upload nothing
    # Checkpoint that is uploaded at the end: trained weights and optimiser state, never frozen weights.
    log_checkpoints: LoggedCheckpoint = LoggedCheckpoint.best
    log_predictions: bool = True  # upload the predictions of the full splits as an artifact
    # Largest checkpoint in MiB that is uploaded.
    max_artifact_mib: int = only_with(
        "log_checkpoints=best", lambda c: c.log_checkpoints is not LoggedCheckpoint["none"], 1024
    )
    max_media_mib: int = 50  # largest total size in MiB of a run's tables with thumbnails; further tables are left out
    table_every_n_validations: int = 1  # validations between two tables of captions
    num_table_rows: int = 16  # clips per table
    thumbnail_height: int = 96  # height in pixels of the four frames in a thumbnail
    jpeg_quality: int = 70  # JPEG quality of thumbnails, 1 to 95

    def __post_init__(self) -> None:
        names = ("max_artifact_mib", "max_media_mib", "table_every_n_validations", "num_table_rows")
        require_positive("logger", self, *names)
        require(
            self.thumbnail_height >= 8,
            f"logger.thumbnail_height must be at least 8 pixels, not {self.thumbnail_height}",
        )
        require(1 <= self.jpeg_quality <= 95, f"logger.jpeg_quality must be 1 to 95, not {self.jpeg_quality}")
