"""A run in Weights & Biases, online or not."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, WandbLogger

from vlmcap.config import Config, TrackioConfig, WandbConfig
from vlmcap.config.names import factors

_OWN: dict[str, str | None] = {"run": None, "data": None}  # what an earlier job of this process left


def wandb_logger(
    config: Config, plain: Mapping[str, Any], folder: Path, job_type: str, known_id: str | None = None
) -> Logger:
    """Runs group by encoder and language model, or by whole model, without a click.

    Group, tags and factors say what differs.

    The configuration has the factors under one word each, as an agent of a W&B sweep sets them too, and all of it under
    `settings`.

    Args:
        config: Of the run.
        plain: The same as plain data.
        folder: Of the run.
        job_type: "train" or "eval".
        known_id: Id of the run that is resumed; offline, another segment with it is written. WANDB_RUN_ID takes
            precedence.
    """
    import wandb

    end_wandb(exit_code=1)  # a job of a sweep that failed would else take in what this one logs
    settings = config.logger
    assert isinstance(settings, WandbConfig)
    reason = offline_reason(settings.offline)
    if reason:
        print(
            f"W&B: offline, {reason}; `wandb sync {folder / 'wandb'}/offline-run-*` uploads the run later.", flush=True
        )
        _stage_beside(folder)
    logger = WandbLogger(
        project=settings.project,
        entity=settings.entity,
        save_dir=folder,
        mode="offline" if reason else None,
        id=os.environ.get("WANDB_RUN_ID") or known_id,
        resume="allow",
        name=run_name(config) + ("" if job_type == "train" else f"-{job_type}-{config.data.split.name}"),
        group=group_name(config),
        job_type=job_type,
        tags=run_tags(config),
        config=factors(config) | {"settings": dict(plain)},
    )
    run = logger.experiment
    _OWN["run"] = run.id if isinstance(run, wandb.Run) else None  # only rank 0 has one
    return logger


def run_name(config: Config) -> str:
    """Parts, tuning and seed in one word."""
    return "-".join([*config.component_names.values(), config.tuning.name, f"s{config.seed}"])


def group_name(config: Config) -> str:
    """What is compared as one: all projectors, tunings and seeds of an encoder and a language model."""
    given = config.logger.group if isinstance(config.logger, WandbConfig | TrackioConfig) else None
    return given or "+".join(name for part, name in config.component_names.items() if part != "projector")


def run_tags(config: Config) -> list[str]:
    """Parts and settings, each as `group=name`."""
    named = config.component_names | {group: getattr(config, group).name for group in ("tuning", "hardware", "data")}
    return [f"{group}={name}"[:64] for group, name in named.items()]  # W&B takes no longer ones


def end_wandb(exit_code: int = 0) -> None:
    """Ends the run that this process began, if there is one: another `wandb.init` would else go on with it."""
    if _OWN["run"] is None:  # so that a run without W&B does not import it
        return
    import wandb

    if wandb.run is not None and wandb.run.id == _OWN["run"]:
        wandb.finish(exit_code=exit_code)
        wandb.teardown()  # the next one reads its own WANDB_DATA_DIR
    _OWN["run"] = None


def offline_reason(is_asked: bool) -> str | None:
    """Why W&B goes offline, or None when it can be reached."""
    if is_asked:
        return "as logger.offline says"
    if os.environ.get("WANDB_MODE") in ("offline", "disabled"):
        return f"as WANDB_MODE={os.environ['WANDB_MODE']} says"
    import wandb

    settings = wandb.Settings()
    if not (os.environ.get("WANDB_API_KEY") or wandb.api.api_key):
        return "as there is no API key (`wandb login` makes one)"
    host = str(settings.base_url).split("//")[-1].split("/")[0]
    name, _, port = host.partition(":")
    try:
        socket.create_connection((name, int(port or 443)), timeout=3).close()
    except OSError:
        return f"as {name} cannot be reached"
    return None


def _stage_beside(folder: Path) -> None:
    """Puts what an offline run will upload into its folder, and not into the home of this computer, unless the user said where."""
    if os.environ.get("WANDB_DATA_DIR") in (None, _OWN["data"]):
        _OWN["data"] = os.environ["WANDB_DATA_DIR"] = str((folder / "wandb").absolute())
