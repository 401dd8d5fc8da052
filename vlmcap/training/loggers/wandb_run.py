"""A run in Weights & Biases, online or offline."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, WandbLogger

from vlmcap.config import Config, TrackioConfig, WandbConfig
from vlmcap.config.names import factors

# Id of the run and data folder that this process has set; a sweep runs several jobs in one process.
_PROCESS_STATE: dict[str, str | None] = {"run": None, "data": None}


def wandb_logger(
    config: Config, plain: Mapping[str, Any], folder: Path, job_type: str, known_id: str | None = None
) -> Logger:
    """Builds the W&B logger, with runs grouped by encoder and language model, or by pretrained VLM.

    The W&B configuration holds the factors of comparison under one word each, as an agent of a W&B sweep sets them, and
    the full configuration under `settings`.

    Args:
        config: Run configuration.
        plain: The same as plain data.
        folder: Run folder.
        job_type: "train" or "eval".
        known_id: Id of the W&B run to resume; offline, this writes another segment with the same id. WANDB_RUN_ID takes
            precedence.
    """
    import wandb

    end_wandb(exit_code=1)  # otherwise this run would continue the W&B run of a failed job of a sweep
    settings = config.logger
    assert isinstance(settings, WandbConfig)
    reason = offline_reason(settings.offline)
    if reason:
        print(
            f"W&B: offline, {reason}; `wandb sync {folder / 'wandb'}/offline-run-*` uploads the run later.", flush=True
        )
        _stage_in_run_folder(folder)
    logger = WandbLogger(
        project=settings.project,
        entity=settings.entity,
        save_dir=folder,
        mode="offline" if reason else None,
        id=os.environ.get("WANDB_RUN_ID") or known_id,
        # "allow" continues the run with this id, if the server has one, and starts it otherwise.
        resume="allow",
        # Runs of training are named by their components, evaluations also by their split: "…-s0-eval-test".
        name=run_name(config) + ("" if job_type == "train" else f"-{job_type}-{config.data.split.name}"),
        group=group_name(config),
        job_type=job_type,
        tags=run_tags(config),
        config=factors(config) | {"settings": dict(plain)},
    )
    run = logger.experiment
    _PROCESS_STATE["run"] = run.id if isinstance(run, wandb.Run) else None  # only rank 0 has one
    return logger


def run_name(config: Config) -> str:
    """Returns components, tuning and seed in one word."""
    return "-".join([*config.component_names.values(), config.tuning.name, f"s{config.seed}"])


def group_name(config: Config) -> str:
    """Returns the group of a run: all projectors, tunings and seeds of one encoder and one language model."""
    given = config.logger.group if isinstance(config.logger, WandbConfig | TrackioConfig) else None
    # The projector stays out, so that runs which differ in it alone are compared within a group.
    return given or "+".join(name for component, name in config.component_names.items() if component != "projector")


def run_tags(config: Config) -> list[str]:
    """Returns components and settings as tags `group=name`."""
    named = config.component_names | {group: getattr(config, group).name for group in ("tuning", "hardware", "data")}
    return [f"{group}={name}"[:64] for group, name in named.items()]  # W&B limits tags to 64 characters


def end_wandb(exit_code: int = 0) -> None:
    """Finishes the W&B run of this process, if there is one; otherwise the next `wandb.init` would continue it."""
    if _PROCESS_STATE["run"] is None:  # avoids importing wandb in runs without it
        return
    import wandb

    if wandb.run is not None and wandb.run.id == _PROCESS_STATE["run"]:
        wandb.finish(exit_code=exit_code)
        # wandb keeps a service process with the settings of the first run.
        wandb.teardown()  # so that the next run reads its own WANDB_DATA_DIR
    _PROCESS_STATE["run"] = None


def offline_reason(is_asked: bool) -> str | None:
    """Returns why W&B is used offline, or None if it can be reached."""
    if is_asked:
        return "because logger.offline=true"
    if os.environ.get("WANDB_MODE") in ("offline", "disabled"):
        return f"because WANDB_MODE={os.environ['WANDB_MODE']}"
    import wandb

    settings = wandb.Settings()
    if not (os.environ.get("WANDB_API_KEY") or wandb.api.api_key):
        return "because there is no API key (run `wandb login`)"
    # "https://api.wandb.ai" -> "api.wandb.ai", and "http://localhost:8080" -> "localhost:8080"
    host = str(settings.base_url).split("//")[-1].split("/")[0]
    name, _, port = host.partition(":")
    try:
        # 3 s; `wandb.init` itself waits up to 90 s.
        socket.create_connection((name, int(port or 443)), timeout=3).close()
    except OSError:
        return f"because {name} cannot be reached"
    return None


def _stage_in_run_folder(folder: Path) -> None:
    """Stages the files that an offline run will upload in the run folder, unless the user has set WANDB_DATA_DIR."""
    # A folder that this process has set for an earlier job of a sweep is replaced, one of the user is not.
    if os.environ.get("WANDB_DATA_DIR") in (None, _PROCESS_STATE["data"]):
        _PROCESS_STATE["data"] = os.environ["WANDB_DATA_DIR"] = str((folder / "wandb").absolute())
