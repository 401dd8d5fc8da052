"""Estimates scores of groups of runs, their differences and effects of factors, with 95 % intervals.

The score of a group is the mean over its seeds. Intervals account for two sources of variation.

*Clips.* They are resampled, the same ones for every run (`vlmcap.metrics.significance`), so that easy and hard clips
cancel out in differences.

*Seeds.* A bootstrap of three seeds would underestimate their variance by a third and have tails that are far too thin.
Instead, the deviation of a mean over seeds is drawn from Student's t distribution. Its variance is the sum of s^2 / n
over the groups involved, with the degrees of freedom of Welch and Satterthwaite (Welch, "The generalization of
'Student's' problem", Biometrika 1947). A group with a single seed gets the pooled variance of the others. Pooling the
variance of all groups would find more differences, but a model close to collapse varies more than others: in a
simulation with three seeds and one group with five times the spread, pooling reported 20 % of equal pairs as different,
and this method 6 %.

If no group has two seeds, nothing is known about their variance, and the intervals are exactly those of `bootstrap` and
`paired_bootstrap` in `vlmcap.metrics.significance`.

All seeds are scored on the same clips, so the interaction of clips and seeds counts twice, and intervals are slightly
too wide rather than too narrow.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vlmcap.metrics.significance import Resampled, holm
from vlmcap.reporting.report.records import Difference, Effect, Ends, Level, Over, Value

Floats = npt.NDArray[np.float64]
Factors = Mapping[str, Value]


@dataclass(frozen=True, slots=True, eq=False)
class RunScore:
    """Score of a run, and its scores on resampled clips; None if it has no scores per clip."""

    score: float
    samples: Resampled | None = None


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value with its interval and the p-value of a difference from 0; both are None if its variation is unknown."""

    value: float
    ends: Ends | None
    p_value: float | None
    over: Over

    def as_difference(self, adjusted: float | None) -> Difference:
        """Converts to the record of the report, with the corrected p-value."""
        low, high = self.ends or (None, None)
        return Difference(self.value, low, high, self.over, self.p_value, adjusted)


class Estimator:
    """Estimates weighted sums of the groups' scores in one metric.

    Args:
        groups: Scores of the seeds of each group, at least one; all samples have the same length and resampled clips.
        resamples: Number of draws; must be the length of the samples if there are any.
    """

    def __init__(self, groups: Mapping[str, Sequence[RunScore]], *, resamples: int) -> None:
        self.groups, self.resamples = groups, resamples
        self.means = {name: float(np.mean([run.score for run in runs])) for name, runs in groups.items()}
        repeated = [[run.score for run in runs] for runs in groups.values() if len(runs) > 1]
        self._freedom = sum(len(scores) - 1 for scores in repeated)
        # Variances of the groups with several seeds are pooled, for groups with one seed only.
        squares = sum(float(np.var(scores, ddof=1)) * (len(scores) - 1) for scores in repeated)
        self._pooled = squares / self._freedom if self._freedom else math.nan

    def estimate(self, weights: Mapping[str, float]) -> Estimate:
        """Estimates a weighted sum of the groups' scores: `{a: 1}` is the score of a, `{b: 1, a: -1}` is b minus a.

        Args:
            weights: Weight of each group; other groups have weight 0.
        """
        value = sum(weight * self.means[name] for name, weight in weights.items())
        clips, seeds = self._over_clips(weights), self._over_seeds(weights)
        if clips is None and seeds is None:
            return Estimate(value, None, None, "")
        # Draws of the two sources of variation are added; a source that is not known adds nothing.
        over: Over = "seeds" if clips is None else "clips" if seeds is None else "clips and seeds"
        # Unknown variation over clips: every draw is the value itself.
        samples = np.full(self.resamples, value) if clips is None else clips
        samples = samples if seeds is None else samples + seeds
        low, high = (float(end) for end in np.quantile(samples, [0.025, 0.975]))
        # Values that differ only by rounding count as equal, as in `paired_bootstrap`.
        extreme = np.abs(samples - value) >= abs(value) - 1e-12 * max(1.0, abs(value))
        # Share of the draws that are as far from their centre as 0 is; 1 is added, so that no p-value is 0.
        return Estimate(value, (low, high), float((1 + extreme.sum()) / (1 + len(samples))), over)

    def differences(self, contrasts: Mapping[str, Mapping[str, float]]) -> dict[str, Difference]:
        """Estimates contrasts by name, with p-values Holm-corrected for their number."""
        estimates = {name: self.estimate(weights) for name, weights in contrasts.items()}
        corrected = holm([math.nan if one.p_value is None else one.p_value for one in estimates.values()])
        return {
            name: one.as_difference(None if math.isnan(adjusted) else adjusted)
            for (name, one), adjusted in zip(estimates.items(), corrected, strict=True)
        }

    def _over_clips(self, weights: Mapping[str, float]) -> Floats | None:
        is_difference = min(weights.values()) < 0
        total: Floats | None = None
        for name, weight in weights.items():
            runs = self.groups[name]
            for run in runs:
                if run.samples is None:
                    return None
                # A group's score is the mean of its seeds, so each has an equal share of the weight.
                draws = run.samples.paired if is_difference else run.samples.single  # (resamples,)
                term = weight / len(runs) * draws
                total = term if total is None else total + term
        return total

    def _over_seeds(self, weights: Mapping[str, float]) -> Floats | None:
        """Draws deviations of the sum caused by other seeds; returns None if no group has two seeds."""
        if not self._freedom:
            return None
        variance = curvature = 0.0
        for name, weight in weights.items():
            scores = [run.score for run in self.groups[name]]
            is_repeated = len(scores) > 1
            # w² s² / n is the variance of a weighted mean over n seeds.
            term = weight**2 / len(scores) * (float(np.var(scores, ddof=1)) if is_repeated else self._pooled)
            variance += term
            curvature += term**2 / (len(scores) - 1 if is_repeated else self._freedom)
        # Welch and Satterthwaite: the degrees of freedom are the squared variance over the sum of its squared terms,
        # each divided by its own degrees of freedom.
        if variance == 0:
            return np.zeros(self.resamples)
        # Another seed than that of the clips, whose draws must be independent of these.
        return math.sqrt(variance) * np.random.default_rng([0, 1]).standard_t(variance**2 / curvature, self.resamples)


def find_effects(
    factors: Sequence[str], groups: Mapping[str, Factors], estimator: Estimator, *, is_higher_better: bool
) -> list[Effect]:
    """Estimates the effect of each factor with at least two levels.

    Two groups match for a factor if they agree in all other factors. Levels are averaged over the combinations that
    every level has: if one run of a grid failed, its combination is not counted for any level. If no combination has
    every level, levels are plain means over their groups, which also differ in other factors, and no difference is
    given.

    Args:
        factors: Keys of the factors.
        groups: Factor values of each group that has the metric and is compared.
        estimator: Estimator of the metric.
        is_higher_better: Whether higher values of the metric are better.
    """
    effects = [_effect(factor, factors, groups, estimator, is_higher_better) for factor in factors]
    return [effect for effect in effects if effect is not None]


def _effect(
    factor: str, factors: Sequence[str], groups: Mapping[str, Factors], estimator: Estimator, is_higher_better: bool
) -> Effect | None:
    # 1. Sort the groups by their level of this factor, and by their values of all other factors.
    levels: dict[str, list[str]] = {}  # groups by level
    combinations: dict[tuple[str, ...], dict[str, str]] = {}  # group by values of the other factors, and by level
    values: dict[str, Value] = {}
    for group, settings in groups.items():
        level = json.dumps(settings[factor])
        values[level] = settings[factor]
        levels.setdefault(level, []).append(group)
        others = tuple(json.dumps(settings[other]) for other in factors if other != factor)
        combinations.setdefault(others, {})[level] = group
    if len(levels) < 2:
        return None
    # 2. Average each level over the combinations that every level has.
    complete = [by_level for by_level in combinations.values() if len(by_level) == len(levels)]
    counted = {level: [by_level[level] for by_level in complete] if complete else levels[level] for level in levels}
    means = {level: {name: 1 / len(names) for name in names} for level, names in counted.items()}
    estimates = {level: estimator.estimate(weights) for level, weights in means.items()}
    # 3. Rank the levels, and compare each with the best one: the weights of a difference are positive and negative.
    ranked = sorted(levels, key=lambda level: estimates[level].value, reverse=is_higher_better)
    differences: dict[str, Difference] = {}
    if complete:
        best = {name: -weight for name, weight in means[ranked[0]].items()}
        differences = estimator.differences({level: means[level] | best for level in ranked[1:]})
    rows = [
        Level(values[level], estimates[level].value, estimates[level].ends, counted[level], differences.get(level))
        for level in ranked
    ]
    return Effect(factor, bool(complete), len(complete) if complete else len(combinations), rows)
