"""The `status.json` of a job: written when the job ends in any way, and read by the sweep that started it."""

from __future__ import annotations

import errno
import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from vlmcap.config import Config
from vlmcap.config_hash import config_hash
from vlmcap.errors import (
    DoesNotFitError,
    InUseError,
    TrialPruned,
    UserError,
    first_line,
    is_out_of_memory,
    storage_problem,
)
from vlmcap.files import replacing
from vlmcap.program import is_sweep, output_folder

STATUS_FILE = "status.json"
FINISHED, FAILED, REFUSED, PRUNED, INTERRUPTED = "finished", "failed", "refused", "pruned", "interrupted"
TRIAL_VARIABLE = "VLMCAP_TRIAL"  # environment variable of a job that a search started
BEGUN = "the run is in progress or was killed"


@dataclass(frozen=True, slots=True)
class Status:
    """Result of a run.

    Attributes:
        status: `finished`; `refused` before training began; `failed` later; `pruned` because its trial was worse than
            others; `interrupted` by a signal, or still in progress.
        reason: One sentence; empty if the run finished.
        error: Class name of the exception.
        config_hash: Hash of the configuration; None if the configuration is invalid.
        overrides: Overrides of the command.
        objective: Value that `train.py` returns, or the last value of a pruned run.
        plan: `peak_gib` and `usable_gib` of a run that did not fit its GPU.
        seconds: Seconds from start to end.
    """

    status: str
    reason: str = ""
    error: str | None = None
    config_hash: str | None = None
    overrides: Sequence[str] = field(default=())
    objective: float | None = None
    plan: dict[str, float] | None = None
    seconds: float = 0.0

    @property
    def is_finished(self) -> bool:
        """Whether the run was completed."""
        return self.status == FINISHED

    def write(self, folder: Path) -> None:
        """Writes `status.json`, whole or not at all."""
        folder.mkdir(parents=True, exist_ok=True)
        plain = asdict(self) | {"overrides": list(self.overrides), "seconds": round(self.seconds, 2)}
        text = json.dumps(plain, ensure_ascii=False, indent=2) + "\n"
        try:
            with replacing(folder / STATUS_FILE) as partial:
                partial.write_text(text, encoding="utf-8")
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT) or not (folder / STATUS_FILE).is_file():
                raise
            # On a full disk, the blocks of the existing file can still be overwritten.
            with (folder / STATUS_FILE).open("r+", encoding="utf-8") as file:
                file.write(text)
                file.truncate()


def read_status(folder: Path) -> Status | None:
    """Reads the status of the run in a folder; returns None if there is none."""
    try:
        plain: dict[str, Any] = json.loads((folder / STATUS_FILE).read_text(encoding="utf-8"))
        # Unknown keys are ignored, so that folders of another version can be read.
        return Status(**{known.name: plain[known.name] for known in fields(Status) if known.name in plain})
    except (OSError, ValueError, TypeError, AttributeError):
        return None


class Record:
    """State of a running job, from which its status is written.

    Args:
        overrides: Overrides of the command.
    """

    def __init__(self, overrides: list[str]) -> None:
        self.overrides, self.started = overrides, time.time()
        self.config: Config | None = None
        self.config_hash: str | None = None
        self.objective = math.nan
        self.claim = ExitStack()  # holds the folder until the status is written

    @property
    def folder(self) -> Path:
        """Folder of the run."""
        # A single run may set `paths.output_dir`; a job of a sweep always runs in Hydra's folder.
        return output_folder() if self.config is None or is_sweep() else Path(self.config.paths.output_dir)

    def begin(self, config: Config) -> None:
        """Claims the folder of the run; a job of a sweep also writes a status, by which a killed job is recognised.

        Raises:
            InUseError: Another run writes to the folder.
        """
        from vlmcap.training.processes import run_folder

        self.claim.enter_context(run_folder(config))
        self.config, self.config_hash = config, config_hash(config)
        # Written at the start: if nobody replaces it, the process was killed.
        if is_sweep():
            self._write(INTERRUPTED, BEGUN)

    def end(self, error: BaseException | None) -> None:
        """Writes the final status, unless this is a single run that has not created its folder."""
        if not is_sweep() and not (self.folder / "config.yaml").is_file():
            return
        status = self._status(error)
        plan = None
        # Planned sizes go into the table of the sweep, for runs that were refused or that ran out of memory.
        if isinstance(error, DoesNotFitError):
            plan = {"peak_gib": round(error.peak_gib, 3), "usable_gib": round(error.usable_gib, 3)}
        elif error is not None and self.config is not None and is_out_of_memory(error):
            plan = _planned(self.config)
        self._write(status, _reason(status, error), error=error, plan=plan)

    def _status(self, error: BaseException | None) -> str:
        if error is None:
            return FINISHED
        if isinstance(error, TrialPruned):
            return PRUNED
        # A mistake that is found before training is refused; later it is a failure.
        if isinstance(error, UserError) and not self._has_trained():
            return REFUSED
        # KeyboardInterrupt and signals derive from BaseException alone.
        return FAILED if isinstance(error, Exception) else INTERRUPTED

    def _has_trained(self) -> bool:
        """Returns whether this run, rather than an earlier one in the same folder, wrote its `config.yaml`."""
        file = self.folder / "config.yaml"
        return self.config is not None and file.is_file() and file.stat().st_mtime >= self.started

    def _write(
        self, status: str, reason: str, *, error: BaseException | None = None, plan: dict[str, float] | None = None
    ) -> None:
        # `TrialPruned` carries its last value.
        objective = getattr(error, "value", self.objective)
        Status(
            status=status,
            reason=reason,
            error=type(error).__name__ if error is not None else None,
            config_hash=self.config_hash,
            overrides=self.overrides,
            objective=None if not math.isfinite(objective) else objective,
            plan=plan,
            seconds=time.time() - self.started,
        ).write(self.folder)


def with_auto_resume(config: Config) -> Config:
    """Sets `checkpoint=last` if `sweep.resume=true` and an earlier start of the job left a checkpoint."""
    last = Path(config.paths.output_dir) / "checkpoints" / "last.ckpt"
    # A checkpoint that the user names goes first.
    is_left = config.sweep.resume and config.checkpoint is None and last.is_file()
    return replace(config, checkpoint="last") if is_left else config


@contextmanager
def recorded() -> Iterator[Record]:
    """Writes the status of the job when it ends; exceptions are propagated."""
    from hydra.core.hydra_config import HydraConfig

    record = Record([*HydraConfig.get().overrides.task])
    # The folder stays claimed until the status is written.
    with record.claim:
        try:
            yield record
        except InUseError:  # the status in the folder belongs to another run
            raise
        except BaseException as error:
            if _is_first_process():
                with suppress(OSError):  # the disk may be full, which the run's own error reports
                    record.end(error)
            raise
        if _is_first_process():
            record.end(None)


def _is_first_process() -> bool:
    """Returns whether this is the first of the processes that train together."""
    # Unset in a single process. torchrun sets both, Lightning's children have LOCAL_RANK only.
    return all(os.environ.get(name, "0") in ("", "0") for name in ("LOCAL_RANK", "RANK"))


def _reason(status: str, error: BaseException | None) -> str:
    if error is None:
        return ""
    if status == INTERRUPTED:
        return "the run was interrupted"
    known = isinstance(error, UserError | TrialPruned)
    if is_out_of_memory(error) and not known:
        return f"out of memory: {first_line(error)}"
    if not known and (sentence := storage_problem(error)):
        return sentence
    return str(error) if known else f"{type(error).__name__}: {first_line(error)}"


def _planned(config: Config) -> dict[str, float] | None:
    """Returns the planned memory of a run that ran out of memory; None if it cannot be planned."""
    from vlmcap.planning.make_plan import make_plan

    try:
        plan = make_plan(config)
    except Exception:  # must not hide the failure of the run
        return None
    return {"peak_gib": round(plan.peak_gib, 3), "usable_gib": round(plan.device.usable_gib, 3)}
