"""Where metrics go beside `metrics.jsonl`, which is always written: a dataclass for each kind."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from omegaconf import MISSING

from vlmcap.config.checks import only_with, require, require_positive
from vlmcap.config.kinds import register

LoggedCheckpoint = Enum("LoggedCheckpoint", {"best": "best", "last": "last", "none": "none"})
LoggedCheckpoint.__doc__ = "Which checkpoint is sent to W&B at the end of a run."


@dataclass
class LoggerConfig:
    """Metrics beside `metrics.jsonl`."""

    kind: str = MISSING


@register("logger")
@dataclass
class NoLoggerConfig(LoggerConfig):
    """Nothing beside `metrics.jsonl`."""

    kind: str = "none"


@register("logger")
@dataclass
class CsvConfig(LoggerConfig):
    """`metrics.csv`."""

    kind: str = "csv"


@register("logger")
@dataclass
class TensorboardConfig(LoggerConfig):
    """TensorBoard's event files."""

    kind: str = "tensorboard"


@register("logger")
@dataclass
class MlflowConfig(LoggerConfig):
    """MLflow."""

    kind: str = "mlflow"
    project: str = "vlmcap"  # its experiment


@register("logger")
@dataclass
class TrackioConfig(LoggerConfig):
    """trackio."""

    kind: str = "trackio"
    project: str = "vlmcap"
    group: str | None = None  # null is the encoder and the language model


@register("logger")
@dataclass
class WandbConfig(LoggerConfig):
    """Weights & Biases; what is sent there beside numbers has a bound."""

    kind: str = "wandb"
    project: str = "vlmcap"
    entity: str | None = None  # a user or a team; null is the key's default
    group: str | None = None  # null is the encoder and the language model
    offline: bool = False
    log_checkpoints: LoggedCheckpoint = (
        LoggedCheckpoint.best
    )  # trained weights and optimiser state, never frozen weights
    log_predictions: bool = True  # the predictions of whole splits as an artifact
    # A larger checkpoint stays here.
    max_artifact_mib: int = only_with(
        "log_checkpoints=best", lambda c: c.log_checkpoints is not LoggedCheckpoint["none"], 1024
    )
    max_media_mib: int = 50  # thumbnails and tables of a run; tables that would go beyond are left out
    table_every_n_validations: int = 1
    num_table_rows: int = 16
    thumbnail_height: int = 96  # pixels of each of a clip's four frames
    jpeg_quality: int = 70

    def __post_init__(self) -> None:
        names = ("max_artifact_mib", "max_media_mib", "table_every_n_validations", "num_table_rows")
        require_positive("logger", self, *names)
        require(
            self.thumbnail_height >= 8,
            f"logger.thumbnail_height must be at least 8 pixels, not {self.thumbnail_height}",
        )
        require(1 <= self.jpeg_quality <= 95, f"logger.jpeg_quality must be 1 to 95, not {self.jpeg_quality}")
