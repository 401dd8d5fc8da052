"""Checkpoints and predictions as W&B artifacts, and which run made and used them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vlmcap.config import Config, LoggedCheckpoint
from vlmcap.files import replacing

_RECORD = "wandb.json"  # in a run's folder: how an evaluation finds its artifact


def log_run_files(run: Any, config: Config, folder: Path) -> None:
    """Sends the chosen checkpoint and the final predictions of a training run, and notes the artifact's name in `wandb.json`.

    Args:
        run: Of W&B.
        config: Says what is sent, and how much at most.
        folder: Of the run.
    """
    kind = config.logger.log_checkpoints
    name = f"checkpoint-{run.id}"
    chosen = folder / "checkpoints" / f"{kind.name}.ckpt"
    if kind is not LoggedCheckpoint["none"] and chosen.is_file() and _is_small(chosen, config):
        run.log_artifact(_checkpoint_artifact(name, chosen, config), aliases=[kind.name])
        with replacing(folder / _RECORD) as partial:
            partial.write_text(json.dumps({"run": run.id, "project": config.logger.project, "checkpoint": name}) + "\n", encoding="utf-8")
    if config.logger.log_predictions:
        _log_predictions(run, [folder / "predictions" / f"{split}.jsonl" for split in ("val", "test")])


def use_checkpoint(run: Any, config: Config, checkpoint: Path) -> None:
    """Says that an evaluation read a checkpoint: the artifact of its training run where that sent it, found by name and content.

    An artifact of the same name and content is the same version for W&B, so that neither the server nor the network is needed to name it.

    Args:
        run: Of W&B, the evaluation's.
        config: Of the evaluation.
        checkpoint: The file.
    """
    if config.logger.log_checkpoints is LoggedCheckpoint["none"] or not checkpoint.is_file() or not _is_small(checkpoint, config):
        return
    record = checkpoint.parent.parent / _RECORD
    known = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
    artifact = _checkpoint_artifact(known.get("checkpoint", f"checkpoint-{checkpoint.stem}-{run.id}"), checkpoint, config)
    if run.offline:  # `use_artifact` asks the server; this notes the use for `wandb sync`
        run._log_artifact(artifact, is_user_created=True, use_after_commit=True)
    else:
        run.use_artifact(artifact)


def log_evaluation_files(run: Any, folder: Path) -> None:
    """Sends predictions and scores of an evaluation."""
    _log_predictions(run, [folder / "predictions.jsonl", folder / "metrics.json"])


def _checkpoint_artifact(name: str, file: Path, config: Config) -> Any:
    import wandb

    parts = config.part_names | {"tuning": config.tuning.name, "seed": config.seed}
    artifact = wandb.Artifact(name, type="model", description="Trained weights and optimiser state; no frozen weights.", metadata=parts)
    artifact.add_file(str(file), name="captioner.ckpt", policy="immutable")  # read where it lies, not copied
    return artifact


def _log_predictions(run: Any, files: list[Path]) -> None:
    import wandb

    there = [file for file in files if file.is_file()]
    if there:
        artifact = wandb.Artifact(f"predictions-{run.id}", type="predictions", description="Captions and scores of each clip.")
        for file in there:
            artifact.add_file(str(file), name=file.name)
        run.log_artifact(artifact)


def _is_small(file: Path, config: Config) -> bool:
    mib, most = file.stat().st_size / 2**20, config.logger.max_artifact_mib
    if mib > most:
        print(f"W&B: {file.name} of {mib:,.0f} MiB is not sent; logger.max_artifact_mib={most} is the limit.", flush=True)
    return mib <= most
