"""Builds the loggers of a run, and finishes them."""

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
    """Builds the loggers of a training run.

    A run that resumes a checkpoint of its own folder continues the records that `logger.json` names; any other run
    starts new ones.

    Args:
        config: Run configuration, with the kind of logger.
        plain: The resolved configuration as plain data.
        folder: Run folder.
        step: Step of the checkpoint that the run resumes from; later lines of `metrics.jsonl` are dropped.

    Raises:
        UserError: The package of the logger is not installed.
    """
    known = ids_to_resume(config, folder, step)
    # First, so that a missing package raises before the files of an earlier run are changed.
    extra = _extra_loggers(config, plain, folder, "train", known, step)
    jsonl, rows = JsonlLogger(folder / "metrics.jsonl"), []
    if rank_zero_only.rank == 0:  # type: ignore[attr-defined]
        is_outside = any(isinstance(logger, WandbLogger | MLFlowLogger | TrackioLogger) for logger in extra)
        # The other loggers give a run no id.
        keep_ids(folder, known | ({config.logger.kind: str(extra[0].version)} if is_outside else {}))
        # A new run drops every line.
        rows = jsonl.drop_after(step if step is not None else -1)
    if isinstance(config.logger, CsvConfig):
        # CSV comes last, because it starts with the rows that were kept.
        extra = [csv_logger(folder, rows)]
    return [jsonl, *extra]


def make_evaluation_loggers(config: Config, plain: Mapping[str, Any], folder: Path) -> list[Logger]:
    """Builds the loggers of an evaluation, which writes `metrics.json` in place of `metrics.jsonl`."""
    return _extra_loggers(config, plain, folder, "eval", {}, None)


def _extra_loggers(
    config: Config, plain: Mapping[str, Any], folder: Path, job_type: str, known: Mapping[str, str], step: int | None
) -> list[Logger]:
    # Ids are kept by kind, so that a run which changes its logger starts a new record.
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
    """Logs the summary and the files of a training run to the loggers that support them, and finishes all loggers.

    Args:
        loggers: Loggers of the run.
        config: Run configuration.
        folder: Run folder, with checkpoints and predictions.
        summary: Content of `summary.json`.
    """
    numbers = flat_summary(summary)
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.experiment.summary.update(numbers)
            log_run_files(logger.experiment, config, folder)
        elif not isinstance(logger, JsonlLogger | CSVLogger):
            # The scores are logged already.
            # Logged as ordinary metrics at the last step, as these services have no summary of a run.
            costs = {name: float(value) for name, value in numbers.items() if name not in summary["scores"]}
            logger.log_metrics(costs, step=int(summary["steps"]))
        if isinstance(logger, TensorBoardLogger):  # hparams table; it adds a point at step 0, so names must differ
            logger.log_hyperparams(
                factors(config),
                {f"final/{name}": numbers[name] for name in (*FINAL_SCORES, PEAK_MEMORY) if name in numbers},
            )
    _end(loggers)


@rank_zero_only
def end_evaluation_loggers(
    loggers: Sequence[Logger], config: Config, folder: Path, checkpoint: Path, scores: Mapping[str, float]
) -> None:
    """Logs scores, predictions and checkpoint of an evaluation to the loggers that support them, and finishes them."""
    trained_by = known_ids(folder_of(checkpoint))
    for logger in loggers:
        if isinstance(logger, MLFlowLogger) and "mlflow" in trained_by:
            logger.experiment.set_tag(logger.run_id, "train_run", trained_by["mlflow"])
        if isinstance(logger, WandbLogger):
            if "wandb" in trained_by:
                logger.experiment.config.update({"train_run": trained_by["wandb"]})
            use_checkpoint(logger.experiment, config, checkpoint)
            # Without NaN, which W&B could not compare.
            logger.experiment.summary.update({name: value for name, value in scores.items() if value == value})
            log_evaluation_files(logger.experiment, folder)
    _end(loggers)


def _end(loggers: Sequence[Logger]) -> None:
    end_wandb()
    for logger in loggers:
        if isinstance(logger, TrackioLogger):
            # Lightning calls `finalize` after each loop, so trackio's logger needs a call of its own.
            logger.end()
        elif not isinstance(logger, WandbLogger):
            logger.finalize("success")
