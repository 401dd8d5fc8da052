"""Logs checkpoints and predictions as W&B artifacts, with the runs that wrote and used them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vlmcap.config import Config, LoggedCheckpoint, WandbConfig
from vlmcap.training.loggers.identity import folder_of, known_ids


def log_run_files(run: Any, config: Config, folder: Path) -> None:
    """Logs the configured checkpoint and the final predictions of a training run.

    Args:
        run: W&B run.
        config: Run configuration, which decides what is logged and its largest size.
        folder: Run folder.
    """
    kind = _settings(config).log_checkpoints
    chosen = folder / "checkpoints" / f"{kind.name}.ckpt"
    if kind is not LoggedCheckpoint["none"] and chosen.is_file() and _is_small(chosen, config):
        run.log_artifact(_checkpoint_artifact(run.id, chosen, config), aliases=[kind.name])
    if _settings(config).log_predictions:
        _log_predictions(run, [folder / "predictions" / f"{split}.jsonl" for split in ("val", "test")])


def use_checkpoint(run: Any, config: Config, checkpoint: Path) -> None:
    """Records that an evaluation used a checkpoint.

    If the training run has logged the checkpoint, the evaluation refers to that artifact. For W&B, an artifact with the
    same name and content is the same version, so this needs neither the server nor the network.

    Args:
        run: W&B run of the evaluation.
        config: Configuration of the evaluation.
        checkpoint: Checkpoint file.
    """
    if (
        _settings(config).log_checkpoints is LoggedCheckpoint["none"]
        or not checkpoint.is_file()
        or not _is_small(checkpoint, config)
    ):
        return
    trained_by = known_ids(folder_of(checkpoint)).get("wandb")
    artifact = _checkpoint_artifact(trained_by or f"{checkpoint.stem}-{run.id}", checkpoint, config)
    if run.offline:  # `use_artifact` needs the server; this records the use for `wandb sync`
        run._log_artifact(artifact, is_user_created=True, use_after_commit=True)
    else:
        run.use_artifact(artifact)


def log_evaluation_files(run: Any, folder: Path) -> None:
    """Logs predictions and scores of an evaluation."""
    _log_predictions(run, [folder / "predictions.jsonl", folder / "metrics.json"])


def _checkpoint_artifact(owner: str, file: Path, config: Config) -> Any:
    import wandb

    components = config.component_names | {"tuning": config.tuning.name, "seed": config.seed}
    description = "Trained weights and optimiser state; no frozen weights."
    artifact = wandb.Artifact(f"checkpoint-{owner}", type="model", description=description, metadata=components)
    artifact.add_file(str(file), name="captioner.ckpt", policy="immutable")  # uploaded in place, without a copy
    return artifact


def _log_predictions(run: Any, files: list[Path]) -> None:
    import wandb

    there = [file for file in files if file.is_file()]
    if there:
        artifact = wandb.Artifact(
            f"predictions-{run.id}", type="predictions", description="Captions and scores of each clip."
        )
        for file in there:
            artifact.add_file(str(file), name=file.name)
        run.log_artifact(artifact)


def _is_small(file: Path, config: Config) -> bool:
    mib, most = file.stat().st_size / 2**20, _settings(config).max_artifact_mib
    if mib > most:
        print(
            f"W&B: {file.name} has {mib:,.0f} MiB and is not uploaded; the limit is logger.max_artifact_mib={most}.",
            flush=True,
        )
    return mib <= most


def _settings(config: Config) -> WandbConfig:
    assert isinstance(config.logger, WandbConfig)
    return config.logger
