"""The Optuna study in the folder of a sweep, as the search and its jobs use it."""

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

STUDY_FILE, STUDY_NAME = "study.db", "vlmcap"


def open_study(sweep: OptunaSweepConfig, folder: Path, mode: str, *, is_parallel: bool) -> optuna.Study:
    """Creates the study of a sweep, or loads an existing one.

    Args:
        sweep: Settings of the sweep: sampler and seed.
        folder: Folder of the sweep.
        mode: `max` or `min`.
        is_parallel: Whether trials are asked for before the values of others are known.

    Raises:
        UserError: Optuna is not installed.
    """
    import_optuna()
    import optuna

    folder.mkdir(parents=True, exist_ok=True)
    storage = _storage(folder / STUDY_FILE)
    direction = optuna.study.StudyDirection.MINIMIZE if mode == "min" else optuna.study.StudyDirection.MAXIMIZE
    study = optuna.create_study(storage=storage, study_name=STUDY_NAME, direction=direction, load_if_exists=True)
    seed = sweep.seed + len(study.get_trials(deepcopy=False))  # a resumed study must not repeat its random draws
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Optuna warns that constant_liar is experimental
        study.sampler = (
            # `constant_liar`: parallel trials count as bad ones until they end, so that others are not drawn beside
            # them.
            optuna.samplers.TPESampler(seed=seed, constant_liar=is_parallel)
            if sweep.sampler is Sampler.tpe
            else optuna.samplers.RandomSampler(seed=seed)
        )
    return study


def trial_of_job(sweep: SweepConfig) -> optuna.Trial | None:
    """Returns the trial of this process, which values are reported to; None outside of a search.

    Args:
        sweep: Settings of the sweep, with those of pruning.
    """
    address = os.environ.get(TRIAL_VARIABLE, "")
    # The address alone is not enough: a program that the job starts inherits the environment.
    if not (address and isinstance(sweep, OptunaSweepConfig)):
        return None
    import_optuna()
    import optuna

    # "<folder>/study.db#<number>"
    path, _, number = address.rpartition("#")
    pruner = (
        optuna.pruners.MedianPruner(
            # The first `prune_after_epochs` epochs never stop a trial; Optuna counts a step as warm-up if it is below
            # the number.
            n_startup_trials=sweep.prune_after_trials,
            n_warmup_steps=sweep.prune_after_epochs + 1,
        )
        if sweep.prune
        else optuna.pruners.NopPruner()
    )
    storage = _storage(Path(path))
    study = optuna.load_study(study_name=STUDY_NAME, storage=storage, pruner=pruner)
    study_id = storage.get_study_id_from_name(STUDY_NAME)
    # `Trial` loads the existing trial, and does not ask for a new one.
    return optuna.Trial(study, storage.get_trial_id_from_study_id_trial_number(study_id, int(number)))


def trial_address(folder: Path, number: int) -> str:
    """Returns the address of a trial, which its job reads from its environment."""
    return f"{folder / STUDY_FILE}#{number}"


def tell(study: optuna.Study, number: int, value: float | None, *, is_pruned: bool) -> None:
    """Reports the result of a trial to its study.

    Args:
        study: Study of the sweep.
        number: Number of the trial.
        value: Objective; None if the trial failed.
        is_pruned: Whether the trial was pruned; the study uses the values that it reported until then.
    """
    import_optuna()
    import optuna

    if is_pruned:
        study.tell(number, state=optuna.trial.TrialState.PRUNED)
    # Optuna accepts no NaN as a value.
    elif value is None or not math.isfinite(value):
        study.tell(number, state=optuna.trial.TrialState.FAIL)
    else:
        study.tell(number, value)


def import_optuna() -> None:
    """Imports Optuna and disables its informational messages.

    Raises:
        UserError: Optuna is not installed.
    """
    try:
        import optuna
    except ImportError as error:
        raise UserError('sweep=optuna needs Optuna: pip install "vlmcap[sweep]"') from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)


def _storage(path: Path) -> optuna.storages.RDBStorage:
    from optuna.storages import RDBStorage

    # timeout: seconds to wait while another job writes
    return RDBStorage(f"sqlite:///{path}", engine_kwargs={"connect_args": {"timeout": 100}})
