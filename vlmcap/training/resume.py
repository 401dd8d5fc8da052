"""How a run may end before its last epoch: the callbacks for it, and what is refused before."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from vlmcap.config import Config, Precision
from vlmcap.errors import UserError

if TYPE_CHECKING:
    import lightning as L

    from vlmcap.training.schedule import StagePlan


def stopping_callbacks(config: Config, plan: StagePlan, folder: Path) -> list[L.Callback]:
    """Early stopping, the guard against divergence, and the end by a signal, which comes last: the others have then seen the step."""
    from vlmcap.training.callbacks.guard import DivergenceGuard
    from vlmcap.training.callbacks.requeue import StopOnSignal
    from vlmcap.training.callbacks.stopping import PatientStop

    callbacks: list[L.Callback] = []
    early, guard = config.callbacks.early_stopping, config.callbacks.guard
    if early.enabled:
        monitor = early.monitor or config.data.monitor
        mode = early.mode or config.better(monitor)
        callbacks.append(PatientStop(plan, monitor=monitor, mode=mode, patience=early.patience, min_delta=early.min_delta))
    if guard.enabled:
        callbacks.append(DivergenceGuard(guard, folder, is_scaled=config.hardware.precision is Precision.fp16))
    return [*callbacks, StopOnSignal(folder, is_requeued=config.trainer.requeue)]


def find_resume(config: Config) -> Path | None:
    """The checkpoint to resume from, if any; with `trainer.requeue=true` the folder's last one is taken without being asked for.

    Raises:
        UserError: It is not there.
    """
    last = Path(config.paths.output_dir) / "checkpoints" / "last.ckpt"
    if config.checkpoint is None:
        return last if config.trainer.requeue and last.is_file() else None
    path = last if config.checkpoint == "last" else Path(config.checkpoint)
    if not path.is_file():
        raise UserError(f"checkpoint={config.checkpoint}: {path} does not exist; set paths.output_dir to the folder of the run to resume")
    return path


def check_folder(config: Config, resumed: Path | None) -> None:
    """`UserError` for a folder that holds a run already, unless this one resumes it or may take its place."""
    folder = Path(config.paths.output_dir)
    if resumed is not None or config.paths.overwrite:
        return
    found = next((path for path in (folder / "summary.json", folder / "checkpoints" / "last.ckpt") if path.is_file()), None)
    if found is not None:
        raise UserError(
            f"paths.output_dir={folder} holds a run already ({found.relative_to(folder)}): choose another folder, resume that run with "
            "checkpoint=last, or set paths.overwrite=true"
        )
