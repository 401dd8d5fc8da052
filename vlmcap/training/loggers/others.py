"""TensorBoard and MLflow by Lightning's loggers, and trackio by one of ours, as Lightning has none."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from vlmcap.config import Config
from vlmcap.config.names import factors
from vlmcap.errors import UserError
from vlmcap.training.loggers.wandb_run import group_name, run_name, run_tags


def tensorboard_logger(folder: Path) -> Logger:
    """Event files under `tensorboard/`.

    Raises:
        UserError: TensorBoard is not installed.
    """
    require_package("tensorboard", "pip install 'vlmcap[tensorboard]'")
    return TensorBoardLogger(folder, name="tensorboard", version="", default_hp_metric=False)


def mlflow_logger(config: Config, folder: Path, job_type: str) -> Logger:
    """A run of MLflow: on MLFLOW_TRACKING_URI, or under `mlruns/` of the run's folder.

    Raises:
        UserError: MLflow is not installed.
    """
    require_package("mlflow", "pip install 'vlmcap[mlflow]'")
    address = os.environ.get("MLFLOW_TRACKING_URI") or f"file:{(folder / 'mlruns').absolute()}"
    if address.startswith("file:"):
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
    tags = dict(tag.split("=", 1) for tag in run_tags(config)) | {"group": group_name(config), "job_type": job_type}
    logger = MLFlowLogger(config.logger.project, run_name(config), tracking_uri=address, tags=tags)
    logger.log_hyperparams(factors(config))
    return logger


class TrackioLogger(Logger):
    """A run of trackio, which keeps it on this computer.

    Args:
        config: Names the project.
        plain: The resolved configuration as plain data.
        job_type: "train" or "eval".

    Raises:
        UserError: trackio is not installed.
    """

    def __init__(self, config: Config, plain: Mapping[str, Any], job_type: str) -> None:
        super().__init__()
        require_package("trackio", "docs/wandb.md says how to install it")
        self._project, self._name = config.logger.project, run_name(config)
        self._begin(factors(config) | {"job_type": job_type, "settings": dict(plain)}, group_name(config))

    @rank_zero_only
    def _begin(self, config: dict[str, Any], group: str) -> None:
        import trackio

        trackio.init(project=self._project, name=self._name, group=group, config=config)

    @property
    def name(self) -> str:
        """The project."""
        return self._project

    @property
    def version(self) -> str:
        """The run's name."""
        return self._name

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Nothing: the run began with them."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """The metrics of a step."""
        import trackio

        trackio.log(dict(metrics), step=step)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Nothing at the end of a loop: those of fitting and of each test follow each other in a run. `end` is the end."""

    @rank_zero_only
    def end(self) -> None:
        """Ends the run, when all is written."""
        import trackio

        trackio.finish()


def require_package(name: str, mend: str) -> None:
    """`UserError` unless a module can be imported."""
    if find_spec(name) is None:
        raise UserError(f"logger={name} needs the package {name}, which is not installed: {mend}")
