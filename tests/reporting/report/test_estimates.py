"""Intervals and tests over clips and seeds: against the paired bootstrap, and against simulated truth."""

from __future__ import annotations

import math

import numpy as np
import pytest

from vlmcap.metrics.clip_metrics import mean_metric
from vlmcap.metrics.significance import bootstrap, compare_runs
from vlmcap.reporting.report.estimates import Estimator, RunScore, find_effects
from vlmcap.reporting.report.scoring import RESAMPLES, resample

GENERATOR = np.random.default_rng(5)


def runs_of(values: dict[str, list[list[float]]]) -> dict[str, list[RunScore]]:
    """Group to runs, of which each is one number a clip."""
    metrics = [{"x": mean_metric("x", run)} for runs in values.values() for run in runs]
    samples = iter(resample(metrics, ["same clips"] * len(metrics)))
    return {name: [RunScore(float(np.mean(run)), next(samples)["x"]) for run in runs] for name, runs in values.items()}


def test_one_seed_each_is_the_paired_bootstrap() -> None:
    values = {
        name: (GENERATOR.normal(size=25) + shift).tolist() for name, shift in (("a", 0.6), ("b", 0.0), ("c", 0.4))
    }
    metrics = {name: mean_metric("x", run) for name, run in values.items()}
    expected = compare_runs(metrics, baseline="a", resamples=RESAMPLES)
    estimator = Estimator(runs_of({name: [run] for name, run in values.items()}), resamples=RESAMPLES)
    found = estimator.differences({name: {name: 1.0, "a": -1.0} for name in "bc"})
    for name in "bc":
        wanted, got = expected[name], found[name]
        assert got.over == "clips"
        assert (got.value, got.low, got.high) == pytest.approx((wanted.difference, wanted.low, wanted.high))
        assert (got.p_value, got.adjusted_p_value) == (wanted.p_value, wanted.adjusted_p_value)
    interval = bootstrap(metrics["a"], resamples=RESAMPLES)
    assert estimator.estimate({"a": 1.0}).ends == pytest.approx((interval.low, interval.high))


def test_seeds_alone_are_welchs_test() -> None:
    groups = {"a": [0.1, 0.3, 0.2, 0.35], "b": [0.6, 0.9, 0.5]}
    found = Estimator({name: [RunScore(score) for score in runs] for name, runs in groups.items()}, resamples=200_000)
    difference = found.estimate({"b": 1.0, "a": -1.0})
    # scipy 1.17's ttest_ind(b, a, equal_var=False): pvalue and confidence_interval()
    assert difference.over == "seeds"
    assert difference.value == pytest.approx(0.4291667)
    assert difference.p_value == pytest.approx(0.051215, abs=0.002)
    assert difference.ends == pytest.approx((-0.004375, 0.862708), abs=0.01)


def test_no_seeds_and_no_clips_say_nothing() -> None:
    estimator = Estimator({"a": [RunScore(1.0)], "b": [RunScore(2.0)]}, resamples=50)
    assert estimator.estimate({"a": 1.0}).ends is None
    difference = estimator.differences({"b": {"b": 1.0, "a": -1.0}})["b"]
    assert (difference.value, difference.low, difference.p_value, difference.adjusted_p_value, difference.over) == (
        1.0,
        None,
        None,
        None,
        "",
    )


def test_a_single_seed_is_given_the_variance_of_the_others() -> None:
    few = Estimator({"a": [RunScore(1.0), RunScore(1.2), RunScore(1.1)], "b": [RunScore(2.0)]}, resamples=5000)
    low, high = few.estimate({"b": 1.0}).ends or (math.nan, math.nan)
    assert (high - low) / 2 == pytest.approx(4.303 * 0.1, rel=0.1)  # t of 2 degrees of freedom times s of the others


def test_equal_seeds_leave_the_clips() -> None:
    values = GENERATOR.normal(size=20).tolist()
    twice, once = (
        Estimator(runs_of({"a": runs}), resamples=RESAMPLES).estimate({"a": 1.0})
        for runs in ([values, values], [values])
    )
    assert twice.ends == pytest.approx(once.ends)
    assert (twice.over, once.over) == ("clips and seeds", "clips")


@pytest.mark.slow
def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    """Runs = quality + seed + clip + noise; an interval over clips alone misses the truth three times too often."""
    inside = {True: 0, False: 0}
    false_claims = 0
    for _ in range(200):
        clips = GENERATOR.normal(size=40)
        values = {
            name: [(clips + GENERATOR.normal(0, 0.3) + GENERATOR.normal(0, 0.5, 40)).tolist() for _ in range(3)]
            for name in "ab"
        }
        estimator = Estimator(runs_of(values), resamples=RESAMPLES)
        found = estimator.estimate({"b": 1.0, "a": -1.0})
        clips_only = estimator._over_clips({"b": 1.0, "a": -1.0})
        assert found.ends is not None
        assert clips_only is not None
        low, high = np.quantile(clips_only, [0.025, 0.975])
        inside[True] += found.ends[0] < 0 < found.ends[1]
        inside[False] += low < 0 < high
        false_claims += (found.p_value or 0) < 0.05
    assert inside[True] >= 186  # 93 %
    assert inside[False] <= 160
    assert false_claims <= 14


def grid(missing: tuple[str, str] | None = None) -> tuple[dict[str, dict[str, str | int]], Estimator]:
    """Encoders by ranks, b worse than a by 1, rank 8 worse by 0.5 and 4 worse by 0.25."""
    levels = [(encoder, rank) for encoder in "ab" for rank in (4, 8, 16) if (encoder, str(rank)) != missing]
    groups: dict[str, dict[str, str | int]] = {
        f"{encoder}{rank}": {"encoder": encoder, "rank": rank} for encoder, rank in levels
    }
    clips = GENERATOR.normal(size=30)
    quality = {"a": 1.0, "b": 0.0, 16: 0.5, 8: 0.0, 4: 0.25}
    values = {name: [(clips + quality[own["encoder"]] + quality[own["rank"]]).tolist()] for name, own in groups.items()}
    return groups, Estimator(runs_of(values), resamples=RESAMPLES)


def test_effects_of_a_grid() -> None:
    groups, estimator = grid()
    encoder, rank = find_effects(["encoder", "rank"], groups, estimator, is_higher_better=True)
    assert encoder.is_matched
    assert encoder.num_combinations == 3
    assert [level.value for level in encoder.levels] == ["a", "b"]
    assert encoder.levels[0].difference is None
    difference = encoder.levels[1].difference
    assert difference is not None
    assert (difference.value, difference.low, difference.high) == pytest.approx(
        (-1, -1, -1)
    )  # the clips are the same and cancel
    assert [level.value for level in rank.levels] == [16, 4, 8]
    assert [level.difference and round(level.difference.value, 6) for level in rank.levels] == [None, -0.25, -0.5]


def test_a_missing_combination_counts_for_nobody() -> None:
    """Without b16, plain means would make a look 1.08 better."""
    groups, estimator = grid(missing=("b", "16"))
    encoder, _ = find_effects(["encoder", "rank"], groups, estimator, is_higher_better=True)
    assert encoder.num_combinations == 2
    assert encoder.levels[1].difference is not None
    assert encoder.levels[1].difference.value == pytest.approx(-1)
    assert encoder.levels[0].groups == ["a4", "a8"]


def test_what_is_never_the_same_otherwise_is_not_matched() -> None:
    groups, estimator = grid()
    those = {name: groups[name] for name in ("a4", "b8")}
    encoder, rank = find_effects(["encoder", "rank"], those, estimator, is_higher_better=True)
    assert not encoder.is_matched
    assert not rank.is_matched
    assert [level.difference for level in encoder.levels] == [None, None]
    assert find_effects(["encoder"], {"a4": groups["a4"]}, estimator, is_higher_better=True) == []


def test_lower_may_be_better() -> None:
    groups, estimator = grid()
    encoder, _ = find_effects(["encoder", "rank"], groups, estimator, is_higher_better=False)
    assert [level.value for level in encoder.levels] == ["b", "a"]
