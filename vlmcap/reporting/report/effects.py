"""What each factor does to the score, over the same combinations of everything else where there are such."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from vlmcap.reporting.report.data import Difference, Effect, Level, Value
from vlmcap.reporting.report.estimates import Estimator

Factors = Mapping[str, Value]


def find_effects(factors: Sequence[str], groups: Mapping[str, Factors], estimator: Estimator, *, is_higher_better: bool) -> list[Effect]:
    """The effect of each factor with two levels or more.

    Two groups are matched for a factor where they agree in all others. A level counts over the combinations that every level has: in a
    grid of which one run failed, its combination counts for nobody. Where no combination has every level, levels are plain means over
    their groups, which differ in other things too, and no difference is given.

    Args:
        factors: Keys.
        groups: Group to the values of its factors: those that have the metric and are compared.
        estimator: Of that metric.
        is_higher_better: Which level comes first.
    """
    effects = [_effect(factor, factors, groups, estimator, is_higher_better) for factor in factors]
    return [effect for effect in effects if effect is not None]


def _effect(
    factor: str, factors: Sequence[str], groups: Mapping[str, Factors], estimator: Estimator, is_higher_better: bool
) -> Effect | None:
    levels: dict[str, list[str]] = {}  # level to its groups
    combinations: dict[tuple[str, ...], dict[str, str]] = {}  # the other factors to level to group
    values: dict[str, Value] = {}
    for group, own in groups.items():
        level = json.dumps(own[factor])
        values[level] = own[factor]
        levels.setdefault(level, []).append(group)
        place = tuple(json.dumps(own[other]) for other in factors if other != factor)
        combinations.setdefault(place, {})[level] = group
    if len(levels) < 2:
        return None
    complete = [found for found in combinations.values() if len(found) == len(levels)]
    counted = {level: [found[level] for found in complete] if complete else levels[level] for level in levels}
    means = {level: {name: 1 / len(names) for name in names} for level, names in counted.items()}
    estimates = {level: estimator.estimate(weights) for level, weights in means.items()}
    ranked = sorted(levels, key=lambda level: estimates[level].value, reverse=is_higher_better)
    differences: dict[str, Difference] = {}
    if complete:
        best = {name: -weight for name, weight in means[ranked[0]].items()}
        differences = estimator.differences({level: means[level] | best for level in ranked[1:]})
    rows = [Level(values[level], estimates[level].value, estimates[level].ends, counted[level], differences.get(level)) for level in ranked]
    return Effect(factor, bool(complete), len(complete) if complete else len(combinations), rows)
