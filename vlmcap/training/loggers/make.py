"""Which loggers a run has, and their end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from vlmcap.config import Config, CsvConfig, MlflowConfig, TensorboardConfig, TrackioConfig, WandbConfig
from vlmcap.config.names import FINAL_SCORES, PEAK_MEMORY, factors, flat_summary
from vlmcap.training.loggers.artifacts import log_evaluation_files, log_run_files, use_checkpoint
from vlmcap.training.loggers.identity import folder_of, ids_to_resume, keep_ids, known_ids
from vlmcap.training.loggers.jsonl import JsonlLogger
from vlmcap.training.loggers.others import TrackioLogger, csv_logger, mlflow_logger, tensorboard_logger
from vlmcap.training.loggers.wandb_run import end_wandb, wandb_logger


def make_loggers(config: Config, plain: Mapping[str, Any], folder: Path, step: int | None) -> list[Logger]:
    """The loggers of a training run.

    Args:
        config: Names the kind.
        plain: The resolved configuration as plain data.
        folder: Of the run.
        step: Of the checkpoint that the run resumes from; later lines of `metrics.jsonl` are dropped. A run that
            resumes a checkpoint of its own folder goes on with the records that `logger.json` names, any other one
            begins new ones.

    Raises:
        UserError: The package of the kind is not installed.
    """
    known = ids_to_resume(config, folder, step)
    extra = _extra_loggers(
        config, plain, folder, "train", known, step
    )  # refuses before a file of an earlier run is cut
    jsonl, rows = JsonlLogger(folder / "metrics.jsonl"), []
    if rank_zero_only.rank == 0:  # type: ignore[attr-defined]
        is_outside = any(isinstance(logger, WandbLogger | MLFlowLogger | TrackioLogger) for logger in extra)
        keep_ids(folder, known | ({config.logger.kind: str(extra[0].version)} if is_outside else {}))
        rows = jsonl.cut_after(step if step is not None else -1)
    if isinstance(config.logger, CsvConfig):
        extra = [csv_logger(folder, rows)]
    return [jsonl, *extra]


def make_evaluation_loggers(config: Config, plain: Mapping[str, Any], folder: Path) -> list[Logger]:
    """The loggers of an evaluation, whose own file is `metrics.json`."""
    return _extra_loggers(config, plain, folder, "eval", {}, None)


def _extra_loggers(
    config: Config, plain: Mapping[str, Any], folder: Path, job_type: str, known: Mapping[str, str], step: int | None
) -> list[Logger]:
    known_id = known.get(config.logger.kind)
    match config.logger:
        case WandbConfig():
            return [wandb_logger(config, plain, folder, job_type, known_id)]
        case TensorboardConfig():
            return [tensorboard_logger(folder, step, is_training=job_type == "train")]
        case MlflowConfig():
            return [mlflow_logger(config, folder, job_type, known_id)]
        case TrackioConfig():
            return [TrackioLogger(config, plain, job_type, known_id)]
    return []


@rank_zero_only
def end_loggers(loggers: Sequence[Logger], config: Config, folder: Path, summary: Mapping[str, Any]) -> None:
    """Gives the numbers of a whole training run and its files to the loggers that have a place for them, and ends them.

    Args:
        loggers: Of the run.
        config: Of the run.
        folder: Of the run, which has its checkpoints and predictions.
        summary: The content of `summary.json`.
    """
    numbers = flat_summary(summary)
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.experiment.summary.update(numbers)
            log_run_files(logger.experiment, config, folder)
        elif not isinstance(logger, JsonlLogger | CSVLogger):
            costs = {
                name: float(value) for name, value in numbers.items() if name not in summary["scores"]
            }  # scores they have already
            logger.log_metrics(costs, step=int(summary["steps"]))
        if isinstance(logger, TensorBoardLogger):  # its table of runs; by other names, as it puts a point at step 0
            logger.log_hyperparams(
                factors(config),
                {f"final/{name}": numbers[name] for name in (*FINAL_SCORES, PEAK_MEMORY) if name in numbers},
            )
    _end(loggers)


@rank_zero_only
def end_evaluation_loggers(
    loggers: Sequence[Logger], config: Config, folder: Path, checkpoint: Path, scores: Mapping[str, float]
) -> None:
    """Gives the scores, the predictions and the checkpoint they are of to the loggers that have a place for them, and ends them."""
    trained_by = known_ids(folder_of(checkpoint))
    for logger in loggers:
        if isinstance(logger, MLFlowLogger) and "mlflow" in trained_by:
            logger.experiment.set_tag(logger.run_id, "train_run", trained_by["mlflow"])
        if isinstance(logger, WandbLogger):
            if "wandb" in trained_by:
                logger.experiment.config.update({"train_run": trained_by["wandb"]})
            use_checkpoint(logger.experiment, config, checkpoint)
            logger.experiment.summary.update({name: value for name, value in scores.items() if value == value})
            log_evaluation_files(logger.experiment, folder)
    _end(loggers)


def _end(loggers: Sequence[Logger]) -> None:
    end_wandb()
    for logger in loggers:
        if isinstance(logger, TrackioLogger):
            logger.end()
        elif not isinstance(logger, WandbLogger):
            logger.finalize("success")
