"""`sweep=optuna`: reads a search space in Hydra's sweep syntax, and runs the trials that Optuna proposes."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vlmcap.config import OptunaSweepConfig, Sampler
from vlmcap.errors import UserError
from vlmcap.overrides import sweep_values
from vlmcap.sweep_syntax import short_names
from vlmcap.sweeping.composing import Composer, Job
from vlmcap.sweeping.job import FINISHED, PRUNED
from vlmcap.sweeping.runner import Runner
from vlmcap.sweeping.study import import_optuna, open_study, tell, trial_address

if TYPE_CHECKING:
    import optuna
    from hydra.core.override_parser.types import Override


# Matches "interval(1, 8)" and "interval(start=1, end=8)", but no decimal bounds.
_WHOLE_BOUNDS = re.compile(r"interval\(\s*(start=)?-?\d+\s*,\s*(end=)?-?\d+\s*\)")


@dataclass(frozen=True, slots=True)
class SearchSpace:
    """Keys that are searched, and overrides that are fixed.

    Attributes:
        distributions: Optuna distribution of each searched key.
        choices: Values of each searched key that has at most about a hundred of them.
        fixed: Overrides of every trial.
    """

    distributions: dict[str, Any]
    choices: dict[str, list[Any]]
    fixed: tuple[str, ...]

    def overrides(self, params: dict[str, Any]) -> list[str]:
        """Returns the overrides of a trial."""
        return [*self.fixed, *(f"{key}={params[key]}" for key in self.distributions)]

    def points(self) -> list[dict[str, Any]]:
        """Returns every combination of the choices.

        Raises:
            UserError: A key has too many values to list them.
        """
        endless = [key for key in self.distributions if key not in self.choices]
        if endless:
            raise UserError(
                f"sweep.sampler=grid cannot try every value of {endless[0]}; give it a list or a range, or set "
                "sweep.sampler=tpe"
            )
        return [dict(zip(self.choices, values, strict=True)) for values in itertools.product(*self.choices.values())]

    def probes(self) -> list[dict[str, Any]]:
        """Returns a few points that together cover every choice, to find misspelt values before anything runs."""
        # As many points as the longest list has values; shorter lists are repeated.
        width = max((len(values) for values in self.choices.values()), default=1)
        # Bounds of an interval are numbers, and the lower one is enough to find a misspelt key.
        lows = {key: one.low for key, one in self.distributions.items() if key not in self.choices}
        return [
            lows | {key: values[index % len(values)] for key, values in self.choices.items()} for index in range(width)
        ]


def read_space(overrides: Sequence[Override]) -> SearchSpace:
    """Reads the search space from parsed overrides; if a key is given twice, the last one counts.

    Raises:
        UserError: No key is searched, or a space is empty.
    """
    distributions: dict[str, Any] = {}
    choices: dict[str, list[Any]] = {}
    fixed: dict[str, str] = {}
    for override in overrides:
        key = override.get_key_element()
        # The last override of a key replaces earlier ones, whatever their kind.
        for known in (distributions, choices, fixed):
            known.pop(key, None)
        if not override.is_sweep_override():
            fixed[key] = f"{key}={override.get_value_element_as_str()}"
            continue
        distributions[key] = _distribution(key, override)
        if (values := _values(distributions[key])) is not None:
            choices[key] = values
    if not distributions:
        raise UserError("sweep=optuna needs a key with several values, such as tuning.lora.rank=8,16,32")
    return SearchSpace(distributions, choices, tuple(fixed.values()))


def _distribution(key: str, override: Override) -> Any:
    from hydra.core.override_parser.types import IntervalSweep, RangeSweep
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    value: Any = override.value()
    # interval(1e-5,1e-3), range(1,8,2), or a list
    is_interval, is_range = isinstance(value, IntervalSweep), isinstance(value, RangeSweep)
    is_log = "log" in getattr(value, "tags", ())
    try:
        if is_interval:
            if _WHOLE_BOUNDS.search(override.input_line or ""):  # Hydra converts the bounds to floats
                return IntDistribution(int(value.start), int(value.end), log=is_log)
            return FloatDistribution(value.start, value.end, log=is_log)
        if is_range and not value.shuffle:
            # Hydra's ranges exclude their end, Optuna's include it.
            values = [*value.range()]
            if is_log or all(isinstance(bound, int) for bound in (value.start, value.stop, value.step)):
                last = int(values[-1])
                # Optuna allows only step 1 on a logarithmic axis.
                return IntDistribution(int(values[0]), last, log=is_log, step=1 if is_log else int(value.step))
            return FloatDistribution(float(values[0]), float(values[-1]), step=float(value.step))
        # Lists, choice(…), glob(…) and shuffled ranges.
        return CategoricalDistribution(sweep_values(override))
    except (ValueError, IndexError) as error:
        raise UserError(f"{override.input_line} is not a valid search space: {error}") from error


def _values(distribution: Any) -> list[Any] | None:
    """Lists the values of a distribution; returns None for more than about a hundred numbers."""
    if hasattr(distribution, "choices"):
        return [*distribution.choices]
    step = getattr(distribution, "step", None)
    # Continuous or logarithmic, or too many values to list.
    if step is None or distribution.log or (distribution.high - distribution.low) / step > 100:
        return None
    count = round((distribution.high - distribution.low) / step) + 1
    return [distribution.low + index * step for index in range(count)]


class Search:
    """Runs trials until there are `sweep.n_trials`, including those of an earlier start.

    Args:
        sweep: Settings of the sweep.
        space: Search space.
        composer: Composes the jobs of trials.
        runner: Runs the jobs.
        mode: `max` or `min`.
        num_parallel: Number of parallel trials.

    Raises:
        UserError: A choice does not exist, or Optuna is not installed; nothing has been written.
    """

    def __init__(
        self,
        sweep: OptunaSweepConfig,
        space: SearchSpace,
        composer: Composer,
        runner: Runner,
        mode: str,
        num_parallel: int,
    ) -> None:
        self._sweep, self._space, self._composer, self._runner = sweep, space, composer, runner
        self._num_parallel = num_parallel
        import_optuna()
        # Composes the probes for their errors alone; nothing has been written so far.
        for point in space.probes():
            composer.job(space.overrides(point), "")
        # A grid search enqueues every point, so that a resumed one continues with those that are left.
        points = space.points() if sweep.sampler is Sampler.grid else []
        self._study = open_study(sweep, runner.folder, mode, is_parallel=num_parallel > 1)
        for point in points:
            self._study.enqueue_trial(point, skip_if_exists=True)

    def run(self) -> None:
        """Asks the study for trials, runs them, and reports their values, until the search is over."""
        while batch := self._next_trials():
            jobs = [self._job(trial) for trial in batch]
            for trial, result in zip(batch, self._runner.run(jobs), strict=True):
                status = result.status
                # Only a finished run has a value; the other trials tell the sampler that they failed or were pruned.
                value = status.objective if status.status == FINISHED else None
                tell(self._study, trial.number, value, is_pruned=status.status == PRUNED)

    def _next_trials(self) -> list[optuna.trial.FrozenTrial]:
        """Returns the trials to run next, beginning with those that an earlier start did not finish."""
        from optuna.trial import TrialState

        trials = self._study.get_trials(deepcopy=False)
        # Failed and pruned trials count as well, so that a search ends.
        left = self._sweep.n_trials - sum(trial.state.is_finished() for trial in trials)
        count = max(0, min(left, self._num_parallel))
        # Trials that an earlier start of the sweep left running come first.
        chosen = [trial for trial in trials if trial.state is TrialState.RUNNING][:count]
        num_waiting = sum(trial.state is TrialState.WAITING for trial in trials)
        # A grid has no more trials than the points that were enqueued.
        while len(chosen) < count and (self._sweep.sampler is not Sampler.grid or num_waiting > 0):
            asked = self._study.ask(self._space.distributions)
            # The study's own record has the parameters that `ask` has drawn.
            chosen.append(self._study.get_trials(deepcopy=False)[asked.number])
            num_waiting -= 1
        return chosen

    def _job(self, trial: optuna.trial.FrozenTrial) -> Job:
        overrides = self._space.overrides(trial.params)
        (name,) = short_names([overrides], [*self._space.distributions])
        return self._composer.job(overrides, name, trial_address(self._runner.folder, trial.number))
