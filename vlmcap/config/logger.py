"""Settings of where metrics, tables and files of a run are shown."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from vlmcap.config.checks import require, require_positive
from vlmcap.config.choices import LoggerKind

LoggedCheckpoint = Enum("LoggedCheckpoint", {"best": "best", "last": "last", "none": "none"})
LoggedCheckpoint.__doc__ = "Which checkpoint is sent to W&B at the end of a run."


@dataclass
class LoggerConfig:
    """Metrics beside `metrics.jsonl`; what is sent to W&B beside numbers has a bound."""

    kind: LoggerKind = LoggerKind.csv
    project: str = "vlmcap"  # of W&B and trackio, and MLflow's experiment
    entity: str | None = None  # of W&B: a user or a team; null is the key's default
    group: str | None = None  # of W&B and trackio; null is the encoder and the language model
    offline: bool = False
    log_checkpoints: LoggedCheckpoint = LoggedCheckpoint.best  # of W&B: trained weights and optimiser state, never frozen weights
    log_predictions: bool = True  # of W&B: the predictions of whole splits as an artifact
    max_artifact_mib: int = 1024  # a larger checkpoint stays here
    max_media_mib: int = 50  # of thumbnails and tables in a run; tables that would go beyond are left out
    table_every_n_validations: int = 1
    thumbnail_height: int = 96  # pixels of each of a clip's four frames
    jpeg_quality: int = 70

    def __post_init__(self) -> None:
        require_positive("logger", self, "max_artifact_mib", "max_media_mib", "table_every_n_validations")
        require(self.thumbnail_height >= 8, f"logger.thumbnail_height must be at least 8 pixels, not {self.thumbnail_height}")
        require(1 <= self.jpeg_quality <= 95, f"logger.jpeg_quality must be 1 to 95, not {self.jpeg_quality}")
