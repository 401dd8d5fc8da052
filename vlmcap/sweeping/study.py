"""An Optuna study in the folder of a sweep, from the side of the search and from that of a job."""

from __future__ import annotations

import math
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from vlmcap.config import OptunaSweepConfig, Sampler, SweepConfig
from vlmcap.errors import UserError
from vlmcap.sweeping.job import TRIAL_VARIABLE

if TYPE_CHECKING:
    import optuna

FILE, NAME = "study.db", "vlmcap"


def open_study(sweep: OptunaSweepConfig, folder: Path, mode: str, *, is_parallel: bool) -> optuna.Study:
    """The study of a sweep, an earlier one where there is one.

    Args:
        sweep: Its sampler and seed.
        folder: Of the sweep.
        mode: `max` or `min`.
        is_parallel: Whether trials are asked for before others are told.

    Raises:
        UserError: Optuna is not installed.
    """
    import_optuna()
    import optuna

    folder.mkdir(parents=True, exist_ok=True)
    storage = _storage(folder / FILE)
    direction = optuna.study.StudyDirection.MINIMIZE if mode == "min" else optuna.study.StudyDirection.MAXIMIZE
    study = optuna.create_study(storage=storage, study_name=NAME, direction=direction, load_if_exists=True)
    seed = sweep.seed + len(study.get_trials(deepcopy=False))  # a study that goes on must not draw the same again
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # constant_liar is called experimental
        study.sampler = (
            optuna.samplers.TPESampler(seed=seed, constant_liar=is_parallel)
            if sweep.sampler is Sampler.tpe
            else optuna.samplers.RandomSampler(seed=seed)
        )
    return study


def trial_of_job(sweep: SweepConfig) -> optuna.Trial | None:
    """The trial that this process runs, to report to; None outside of a search.

    Args:
        sweep: How trials are pruned.
    """
    address = os.environ.get(TRIAL_VARIABLE, "")
    if not (address and isinstance(sweep, OptunaSweepConfig)):
        return None
    import_optuna()
    import optuna

    path, _, number = address.rpartition("#")
    pruner = (
        optuna.pruners.MedianPruner(
            n_startup_trials=sweep.prune_after_trials, n_warmup_steps=sweep.prune_after_epochs + 1
        )
        if sweep.prune
        else optuna.pruners.NopPruner()
    )
    storage = _storage(Path(path))
    study = optuna.load_study(study_name=NAME, storage=storage, pruner=pruner)
    study_id = storage.get_study_id_from_name(NAME)
    return optuna.Trial(study, storage.get_trial_id_from_study_id_trial_number(study_id, int(number)))


def trial_address(folder: Path, number: int) -> str:
    """Where a job finds its trial, as text for its environment."""
    return f"{folder / FILE}#{number}"


def tell(study: optuna.Study, number: int, value: float | None, *, is_pruned: bool) -> None:
    """Tells the study how a trial ended.

    Args:
        study: It.
        number: Of the trial.
        value: The objective; None for a trial that came to nothing.
        is_pruned: Whether it was stopped; its reports count.
    """
    import_optuna()
    import optuna

    if is_pruned:
        study.tell(number, state=optuna.trial.TrialState.PRUNED)
    elif value is None or not math.isfinite(value):
        study.tell(number, state=optuna.trial.TrialState.FAIL)
    else:
        study.tell(number, value)


def import_optuna() -> None:
    """Makes Optuna silent.

    Raises:
        UserError: It is not installed.
    """
    try:
        import optuna
    except ImportError as error:
        raise UserError('sweep=optuna needs Optuna: pip install "vlmcap[sweep]"') from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)


def _storage(path: Path) -> optuna.storages.RDBStorage:
    from optuna.storages import RDBStorage

    return RDBStorage(
        f"sqlite:///{path}", engine_kwargs={"connect_args": {"timeout": 100}}
    )  # seconds to wait for another job's writing
