"""CSV, TensorBoard and MLflow by Lightning's loggers, and trackio by one of ours, as Lightning has none."""

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
    """`metrics.csv`, which begins with the rows of `metrics.jsonl` that a resumed run keeps.

    Lightning starts the file again.

    Args:
        folder: The run's folder.
        rows: Rows to begin with.
    """
    logger = CSVLogger(folder, name="", version="", prefix="")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Experiment logs directory")  # it says that earlier rows will be lost
        _ = logger.experiment
    for row in rows:
        logger.log_metrics(
            {name: value for name, value in row.items() if name != "step" and value is not None}, step=row["step"]
        )
    if rows:
        logger.save()
    return logger


def tensorboard_logger(folder: Path, step: int | None, *, is_training: bool) -> Logger:
    """Event files under `tensorboard/`.

    Args:
        folder: The run's folder.
        step: Step that the run resumes from, beyond which earlier events no longer count; None for a run from the
            start.
        is_training: Whether events in the folder are those of an earlier start of the run, which are removed where it
            starts again.

    Raises:
        UserError: TensorBoard is not installed.
    """
    require_package("tensorboard", "pip install 'vlmcap[tensorboard]'")
    if is_training and step is None and rank_zero_only.rank == 0:  # type: ignore[attr-defined]
        for file in (folder / "tensorboard").glob("events.out.tfevents.*"):
            file.unlink()
    purge_step = None if step is None else step + 1
    return TensorBoardLogger(folder, name="tensorboard", version="", default_hp_metric=False, purge_step=purge_step)


def mlflow_logger(config: Config, folder: Path, job_type: str, known_id: str | None) -> Logger:
    """A run of MLflow: on MLFLOW_TRACKING_URI, or under `mlruns/` of the run's folder.

    Args:
        config: Run configuration.
        folder: The run's folder.
        job_type: "train" or "eval".
        known_id: Id of the run that is resumed; a new one begins where the store has no such run.

    Raises:
        UserError: MLflow is not installed.
    """
    require_package("mlflow", "pip install 'vlmcap[mlflow]'")
    assert isinstance(config.logger, MlflowConfig)
    address = os.environ.get("MLFLOW_TRACKING_URI") or f"file:{(folder / 'mlruns').absolute()}"
    if address.startswith("file:"):
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
    tags = dict(tag.split("=", 1) for tag in run_tags(config)) | {"group": group_name(config), "job_type": job_type}
    logged = _reopened_params(address, known_id) if known_id else None
    run_id = known_id if logged is not None else None
    logger = MLFlowLogger(config.logger.project, run_name(config), tracking_uri=address, tags=tags, run_id=run_id)
    logger.log_hyperparams({name: value for name, value in factors(config).items() if name not in (logged or {})})
    return logger


@rank_zero_only
def _reopened_params(address: str, run_id: str) -> dict[str, str] | None:
    """The parameters of a run, which MLflow lets nobody change, after marking it as running.

    None where there is no such run.
    """
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

    client = MlflowClient(address)
    try:
        run = client.get_run(run_id)
    except MlflowException:
        return None
    if run.info.lifecycle_stage == "deleted":
        return None
    client.update_run(run_id, status="RUNNING")
    params: dict[str, str] = run.data.params
    return params


class TrackioLogger(Logger):
    """A run of trackio, which keeps it on this computer.

    Args:
        config: Names the project.
        plain: The resolved configuration as plain data.
        job_type: "train" or "eval".
        known_id: Name of the run that is resumed.

    Raises:
        UserError: trackio is not installed.
    """

    def __init__(self, config: Config, plain: Mapping[str, Any], job_type: str, known_id: str | None = None) -> None:
        super().__init__()
        require_package("trackio", "docs/wandb.md says how to install it")
        assert isinstance(config.logger, TrackioConfig)
        self._project, self._name = config.logger.project, known_id or run_name(config)
        resume = "allow" if known_id else "never"
        self._begin(factors(config) | {"job_type": job_type, "settings": dict(plain)}, group_name(config), resume)

    @rank_zero_only
    def _begin(self, config: dict[str, Any], group: str, resume: str) -> None:
        import trackio

        run = trackio.init(project=self._project, name=self._name, group=group, config=config, resume=resume)
        self._name = run.name  # another one where the project has a run of this name

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
        """Nothing at the end of a loop: those of fitting and of each test follow each other in a run.

        `end` is the end.
        """

    @rank_zero_only
    def end(self) -> None:
        """Ends the run, when all is written."""
        import trackio

        trackio.finish()


def require_package(name: str, mend: str) -> None:
    """`UserError` unless a module can be imported."""
    if find_spec(name) is None:
        raise UserError(f"logger={name} needs the package {name}, which is not installed: {mend}")
