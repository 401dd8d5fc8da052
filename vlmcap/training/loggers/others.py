"""Lightning's loggers for CSV, TensorBoard and MLflow, and a logger for trackio, which Lightning lacks."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from vlmcap.config import Config, MlflowConfig, TrackioConfig
from vlmcap.config.names import factors
from vlmcap.errors import UserError
from vlmcap.training.loggers.wandb_run import group_name, run_name, run_tags


def csv_logger(folder: Path, rows: Sequence[Mapping[str, Any]]) -> Logger:
    """Builds the logger of `metrics.csv`.

    Lightning overwrites the file, so it is first filled with the rows of `metrics.jsonl` that a resumed run keeps.

    Args:
        folder: Run folder.
        rows: Rows to start with.
    """
    logger = CSVLogger(folder, name="", version="", prefix="")
    with warnings.catch_warnings():
        # Lightning warns that earlier rows will be lost, but they are written again below.
        warnings.filterwarnings("ignore", "Experiment logs directory")
        # Opened before rows are written, because Lightning then deletes an earlier file.
        _ = logger.experiment
    for row in rows:
        logger.log_metrics(
            {name: value for name, value in row.items() if name != "step" and value is not None}, step=row["step"]
        )
    if rows:
        logger.save()
    return logger


def tensorboard_logger(folder: Path, step: int | None, *, is_training: bool) -> Logger:
    """Builds the logger of event files under `tensorboard/`.

    Args:
        folder: Run folder.
        step: Step that the run resumes from; TensorBoard hides later events of the earlier process. None for a new run.
        is_training: Whether this is a training run; a new training run removes the event files of an earlier one.

    Raises:
        UserError: TensorBoard is not installed.
    """
    require_package("tensorboard", "pip install 'vlmcap[tensorboard]'")
    if is_training and step is None and rank_zero_only.rank == 0:  # type: ignore[attr-defined]
        # Event files of an earlier run in this folder would be drawn into the same curves.
        for file in (folder / "tensorboard").glob("events.out.tfevents.*"):
            file.unlink()
    # TensorBoard hides the events of the interrupted run from this step on.
    purge_step = None if step is None else step + 1
    return TensorBoardLogger(folder, name="tensorboard", version="", default_hp_metric=False, purge_step=purge_step)


def mlflow_logger(config: Config, folder: Path, job_type: str, known_id: str | None) -> Logger:
    """Builds the logger of an MLflow run: on MLFLOW_TRACKING_URI, or under `mlruns/` of the run folder.

    Args:
        config: Run configuration.
        folder: Run folder.
        job_type: "train" or "eval".
        known_id: Id of the MLflow run to resume; a new run starts if the store has no such run.

    Raises:
        UserError: MLflow is not installed.
    """
    require_package("mlflow", "pip install 'vlmcap[mlflow]'")
    assert isinstance(config.logger, MlflowConfig)
    address = os.environ.get("MLFLOW_TRACKING_URI") or f"file:{(folder / 'mlruns').absolute()}"
    # MLflow 3 refuses file stores unless this variable is set.
    if address.startswith("file:"):
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
    # "encoder=siglip2" -> {"encoder": "siglip2"}
    tags = dict(tag.split("=", 1) for tag in run_tags(config)) | {"group": group_name(config), "job_type": job_type}
    logged = _reopened_params(address, known_id) if known_id else None
    run_id = known_id if logged is not None else None
    logger = MLFlowLogger(config.logger.project, run_name(config), tracking_uri=address, tags=tags, run_id=run_id)
    # MLflow raises if a parameter is logged again with another value.
    logger.log_hyperparams({name: value for name, value in factors(config).items() if name not in (logged or {})})
    return logger


@rank_zero_only
def _reopened_params(address: str, run_id: str) -> dict[str, str] | None:
    """Marks an MLflow run as running and returns its parameters, which MLflow does not allow to change.

    Returns None if there is no such run.
    """
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

    client = MlflowClient(address)
    try:
        run = client.get_run(run_id)
    except MlflowException:
        return None
    # A run in MLflow's trash cannot be written to, so a new one begins.
    if run.info.lifecycle_stage == "deleted":
        return None
    # The stopped run was marked as finished or failed.
    client.update_run(run_id, status="RUNNING")
    params: dict[str, str] = run.data.params
    return params


class TrackioLogger(Logger):
    """Logger of a trackio run, which trackio stores on this computer.

    Args:
        config: Run configuration, with the name of the project.
        plain: The resolved configuration as plain data.
        job_type: "train" or "eval".
        known_id: Name of the run to resume.

    Raises:
        UserError: trackio is not installed.
    """

    def __init__(self, config: Config, plain: Mapping[str, Any], job_type: str, known_id: str | None = None) -> None:
        super().__init__()
        require_package("trackio", "docs/howto/loggers.md says how to install it")
        assert isinstance(config.logger, TrackioConfig)
        self._project, self._name = config.logger.project, known_id or run_name(config)
        # A new run must not continue one of the same name.
        resume = "allow" if known_id else "never"
        self._begin(factors(config) | {"job_type": job_type, "settings": dict(plain)}, group_name(config), resume)

    @rank_zero_only
    def _begin(self, config: dict[str, Any], group: str, resume: str) -> None:
        import trackio

        run = trackio.init(project=self._project, name=self._name, group=group, config=config, resume=resume)
        self._name = run.name  # differs if the project already has a run of this name

    @property
    def name(self) -> str:
        """Name of the project."""
        return self._project

    @property
    def version(self) -> str:
        """Name of the run."""
        return self._name

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Does nothing, because the run was created with its settings."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Logs the metrics of a step."""
        import trackio

        trackio.log(dict(metrics), step=step)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Does nothing, because a run has several loops (fit and tests); `end` finishes the run."""

    @rank_zero_only
    def end(self) -> None:
        """Finishes the run after everything is logged."""
        import trackio

        trackio.finish()


def require_package(name: str, hint: str) -> None:
    """Raises a `UserError` with an installation hint unless a package is installed."""
    if find_spec(name) is None:
        raise UserError(f"logger={name} needs the package {name}, which is not installed: {hint}")
