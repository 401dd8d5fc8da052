"""Checkpoints and predictions as W&B artifacts, and which run made and used them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vlmcap.config import Config, LoggedCheckpoint, WandbConfig
from vlmcap.training.loggers.identity import folder_of, known_ids


def log_run_files(run: Any, config: Config, folder: Path) -> None:
    """Sends the chosen checkpoint and the final predictions of a training run.

    Args:
        run: Of W&B.
        config: Says what is sent, and how much at most.
        folder: Of the run.
    """
    kind = _settings(config).log_checkpoints
    chosen = folder / "checkpoints" / f"{kind.name}.ckpt"
    if kind is not LoggedCheckpoint["none"] and chosen.is_file() and _is_small(chosen, config):
        run.log_artifact(_checkpoint_artifact(run.id, chosen, config), aliases=[kind.name])
    if _settings(config).log_predictions:
        _log_predictions(run, [folder / "predictions" / f"{split}.jsonl" for split in ("val", "test")])


def use_checkpoint(run: Any, config: Config, checkpoint: Path) -> None:
    """Says that an evaluation read a checkpoint.

    The artifact of its training run where that sent it, found by name and content.

    An artifact of the same name and content is the same version for W&B, so that neither the server nor the network is
    needed to name it.

    Args:
        run: Of W&B, the evaluation's.
        config: Of the evaluation.
        checkpoint: The file.
    """
    if (
        _settings(config).log_checkpoints is LoggedCheckpoint["none"]
        or not checkpoint.is_file()
        or not _is_small(checkpoint, config)
    ):
        return
    trained_by = known_ids(folder_of(checkpoint)).get("wandb")
    artifact = _checkpoint_artifact(trained_by or f"{checkpoint.stem}-{run.id}", checkpoint, config)
    if run.offline:  # `use_artifact` asks the server; this notes the use for `wandb sync`
        run._log_artifact(artifact, is_user_created=True, use_after_commit=True)
    else:
        run.use_artifact(artifact)


def log_evaluation_files(run: Any, folder: Path) -> None:
    """Sends predictions and scores of an evaluation."""
    _log_predictions(run, [folder / "predictions.jsonl", folder / "metrics.json"])


def _checkpoint_artifact(owner: str, file: Path, config: Config) -> Any:
    import wandb

    parts = config.component_names | {"tuning": config.tuning.name, "seed": config.seed}
    description = "Trained weights and optimiser state; no frozen weights."
    artifact = wandb.Artifact(f"checkpoint-{owner}", type="model", description=description, metadata=parts)
    artifact.add_file(str(file), name="captioner.ckpt", policy="immutable")  # read where it lies, not copied
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
            f"W&B: {file.name} of {mib:,.0f} MiB is not sent; logger.max_artifact_mib={most} is the limit.", flush=True
        )
    return mib <= most


def _settings(config: Config) -> WandbConfig:
    assert isinstance(config.logger, WandbConfig)
    return config.logger
