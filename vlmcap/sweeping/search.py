"""`sweep=optuna`: trials that Optuna proposes, each told how it ended."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vlmcap.config import Sampler, SweepConfig
from vlmcap.sweep_syntax import short_names
from vlmcap.sweeping.composing import Composer, Job
from vlmcap.sweeping.runner import Runner
from vlmcap.sweeping.search_space import SearchSpace
from vlmcap.sweeping.status import FINISHED, PRUNED
from vlmcap.sweeping.study import import_optuna, open_study, tell, trial_address

if TYPE_CHECKING:
    import optuna


class Search:
    """Runs trials until there are `sweep.n_trials`, those of an earlier start included.

    Args:
        sweep: How.
        space: What is searched.
        composer: Makes jobs of trials.
        runner: Runs them.
        mode: `max` or `min`.
        width: Trials at a time.

    Raises:
        UserError: A choice does not exist, or Optuna is not installed; nothing was made.
    """

    def __init__(self, sweep: SweepConfig, space: SearchSpace, composer: Composer, runner: Runner, mode: str, width: int) -> None:
        self._sweep, self._space, self._composer, self._runner, self._width = sweep, space, composer, runner, width
        import_optuna()
        for point in space.probes():
            composer.job(space.overrides(point), "")
        points = space.points() if sweep.sampler is Sampler.grid else []
        self._study = open_study(sweep, runner.folder, mode, is_parallel=width > 1)
        for point in points:
            self._study.enqueue_trial(point, skip_if_exists=True)

    def run(self) -> None:
        """Asks, runs and tells."""
        while batch := self._next():
            jobs = [self._job(trial) for trial in batch]
            for trial, done in zip(batch, self._runner.run(jobs), strict=True):
                status = done.status
                value = status.objective if status.status == FINISHED else None
                tell(self._study, trial.number, value, is_pruned=status.status == PRUNED)

    def _next(self) -> list[optuna.trial.FrozenTrial]:
        """The trials to run now: first those that an earlier start left open."""
        from optuna.trial import TrialState

        trials = self._study.get_trials(deepcopy=False)
        left = self._sweep.n_trials - sum(trial.state.is_finished() for trial in trials)
        chosen = [trial for trial in trials if trial.state is TrialState.RUNNING][: max(0, min(left, self._width))]
        num_waiting = sum(trial.state is TrialState.WAITING for trial in trials)
        while len(chosen) < min(left, self._width) and (self._sweep.sampler is not Sampler.grid or num_waiting > 0):
            asked = self._study.ask(self._space.distributions)
            chosen.append(self._study.get_trials(deepcopy=False)[asked.number])
            num_waiting -= 1
        return chosen

    def _job(self, trial: optuna.trial.FrozenTrial) -> Job:
        overrides = self._space.overrides(trial.params)
        (name,) = short_names([overrides], [*self._space.distributions])
        return self._composer.job(overrides, name, trial_address(self._runner.folder, trial.number))
