"""Rows of a report: runs with their names, and groups of runs that differ only in their seed, ranked and tested."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from vlmcap.metrics.significance import Resampled
from vlmcap.reporting.report.captions import Captions
from vlmcap.reporting.report.estimates import Estimator, RunScore
from vlmcap.reporting.report.folders import RunFolder
from vlmcap.reporting.report.naming import factor_values, group_name, seed_of, short_ids
from vlmcap.reporting.report.records import CategoryRow, GroupRow, RunRow
from vlmcap.reporting.report.scoring import RESAMPLES

ALPHA = 0.05
"""Significance level: a difference counts if its adjusted p-value is below it."""


@dataclass(frozen=True, slots=True, eq=False)
class Member:
    """A run with its captions and resampled scores.

    Attributes:
        run: Contents of the run folder.
        captions: Captions by split.
        samples: Scores on resampled clips by metric.
        not_compared: Why the run is not compared with others; empty if it is.
        has_metric: Whether the run has the report's metric.
        id: Id of the run.
        group: Id of its group.
    """

    run: RunFolder
    captions: Mapping[str, Captions]
    samples: Mapping[str, Resampled]
    not_compared: str
    has_metric: bool
    id: str = ""
    group: str = ""

    @property
    def is_compared(self) -> bool:
        """Whether the run is compared with others."""
        return self.has_metric and not self.not_compared


def identify(members: Sequence[Member], factors: Sequence[str], metric: str, *, is_higher_better: bool) -> list[Member]:
    """Assigns ids and sorts: compared runs best first, then those not compared, then those without the metric."""
    paths = [str(member.run.path.resolve()) for member in members]
    contents = [
        json.dumps(factor_values(member.run, factors) if member.run.config else path, default=str)
        for member, path in zip(members, paths, strict=True)
    ]
    ids, groups = short_ids(paths, "r"), short_ids(contents, "g")
    named = [
        dataclasses.replace(member, id=ids[path], group=groups[content])
        for member, path, content in zip(members, paths, contents, strict=True)
    ]
    # Ids are hashes of the folder and of the configuration, so that they stay the same in a later report.
    named = _without_repeats(named)
    sign = -1 if is_higher_better else 1
    return sorted(
        # False sorts before True.
        named,
        key=lambda one: (not one.is_compared, not one.has_metric, sign * one.run.scores.get(metric, 0.0)),
    )


def group_rows(
    members: Sequence[Member], factors: Sequence[str], metric: str, shown: Sequence[str], *, is_higher_better: bool
) -> tuple[list[GroupRow], Estimator]:
    """Returns the groups, best first, and the estimator of the metric.

    Args:
        members: Runs with ids from `identify`.
        factors: Keys that differ between runs.
        metric: Metric that groups are ranked by.
        shown: Metrics that get an interval, in addition to all resampled ones.
        is_higher_better: Whether higher values of the metric are better.
    """
    # 1. Groups of runs that differ only in their seed, and an estimator per metric.
    groups: dict[str, list[Member]] = {}
    for member in members:
        groups.setdefault(member.group, []).append(member)
    counted = {name: _counted(those) for name, those in groups.items()}
    names = dict.fromkeys([metric, *shown, *(name for member in members for name in member.samples)])
    estimators = {name: _estimator(counted, name) for name in names}
    # 2. The best group by the report's metric, and the differences of all other groups from it.
    main = estimators[metric]
    # `_counted` gives compared runs only if there are any, so the first one tells it of all.
    means = {name: main.means[name] for name, those in counted.items() if those and those[0].is_compared}
    best = (max if is_higher_better else min)(means, key=means.__getitem__) if means else None
    # Weights of 1 and -1 are the score of a group minus that of the best one.
    differences = main.differences({name: {name: 1.0, best: -1.0} for name in means if name != best}) if best else {}
    # 3. A row per group.
    rows = []
    for name, those in groups.items():
        known = {key: one.estimate({name: 1.0}) for key, one in estimators.items() if name in one.groups}
        difference = differences.get(name)
        p_value = None if difference is None else difference.adjusted_p_value
        is_significant = p_value is not None and p_value < ALPHA
        rows.append(
            GroupRow(
                id=name,
                name=group_name(those[0].run, factors),
                factors=factor_values(those[0].run, factors),
                runs=[member.id for member in those],
                seeds=sorted(seed for member in counted[name] if (seed := seed_of(member.run)) is not None),
                scores=_mean_scores(counted[name]),
                intervals={key: one.ends for key, one in known.items() if one.ends is not None},
                over=known[metric].over if metric in known else "",
                difference=difference,
                is_best=name == best,
                is_tied=name == best or (difference is not None and not is_significant),
                costs=_costs(those),
            )
        )
    sign = -1 if is_higher_better else 1
    rows.sort(key=lambda row: (row.id not in means, metric not in row.scores, sign * row.scores.get(metric, 0.0)))
    return rows, main


def run_rows(members: Sequence[Member], groups: Sequence[GroupRow], factors: Sequence[str], split: str) -> list[RunRow]:
    """Returns the rows of the runs in the order of the members; `split` is that of the metric."""
    names = {group.id: group.name for group in groups}
    has_seeds = any(len(group.runs) > 1 for group in groups)
    labels = [
        names[member.group] + (f", seed {seed}" if has_seeds and (seed := seed_of(member.run)) is not None else "")
        for member in members
    ]
    # Equal names, such as those of two runs without a seed, differ by their folders.
    counts = Counter(labels)
    return [
        _run_row(member, label if counts[label] == 1 else f"{label} ({member.run.path.name})", factors, split)
        for member, label in zip(members, labels, strict=True)
    ]


def find_categories(members: Sequence[Member], split: str) -> list[CategoryRow]:
    """Returns scores of the compared runs by category: those that a run logged, else means over its captions."""
    clips: dict[str, int] = {}
    scores: dict[str, dict[str, dict[str, float]]] = {}
    for member in members:
        for name, row in _by_category(member, split).items() if member.is_compared else ():
            clips[name] = max(clips.get(name, 0), round(row.pop("clips", 0)))
            scores.setdefault(name, {})[member.id] = row
    return [
        CategoryRow(name, clips[name], by_run)
        for name, by_run in sorted(scores.items(), key=lambda item: -clips[item[0]])
    ]


def _by_category(member: Member, split: str) -> dict[str, dict[str, float]]:
    start = f"{split}/category/"
    categories: dict[str, dict[str, float]] = {}
    for key, value in member.run.scores.items():
        if key.startswith(start):
            name, _, metric = key.removeprefix(start).rpartition("/")
            categories.setdefault(name, {})[metric] = value
    captions = member.captions.get(split)
    if categories or captions is None or not any(captions.categories):
        return categories
    for name in dict.fromkeys(captions.categories):
        rows = [index for index, category in enumerate(captions.categories) if category == name]
        # BLEU of a category is no mean of the BLEU of its clips.
        means = {metric: float(values[rows].mean()) for metric, values in captions.scores.items() if metric != "bleu_4"}
        categories[name or "(none)"] = {"clips": float(len(rows)), **means}
    return categories


def _without_repeats(members: Sequence[Member]) -> list[Member]:
    """Excludes runs that repeat the configuration and the seed of another: they would look like agreeing seeds."""
    seen: dict[tuple[str, int], Member] = {}
    kept = []
    for member in members:
        seed = seed_of(member.run)
        if member.is_compared and seed is not None:
            first = seen.setdefault((member.group, seed), member)
            if first is not member:
                why = f"Not compared: it repeats the configuration and the seed of {first.run.path}, which is counted."
                member = dataclasses.replace(member, not_compared=why)
        kept.append(member)
    return kept


def _counted(members: Sequence[Member]) -> list[Member]:
    """Returns the members whose mean is the score of the group: those compared, else all that have the metric."""
    return [member for member in members if member.is_compared] or [member for member in members if member.has_metric]


def _estimator(groups: Mapping[str, Sequence[Member]], metric: str) -> Estimator:
    """Creates the estimator of a metric for the groups whose runs all have it."""
    known = {
        name: [RunScore(member.run.scores[metric], member.samples.get(metric)) for member in members]
        for name, members in groups.items()
        if members and all(metric in member.run.scores for member in members)
    }
    return Estimator(known, resamples=RESAMPLES)


def _mean_scores(members: Sequence[Member]) -> dict[str, float]:
    names = members[0].run.scores if members else {}
    return {
        name: float(np.mean([member.run.scores[name] for member in members]))
        for name in names
        if "/category/" not in name and all(name in member.run.scores for member in members)
    }


def _costs(members: Sequence[Member]) -> dict[str, float | None]:
    runs = [member.run for member in members if member.run.status == "finished"]
    known: dict[str, list[float | None]] = {
        "peak_memory_gib": [run.peak_memory_gib for run in runs],
        "seconds": [run.seconds.get("total") for run in runs],
        "trained": [run.parameters.get("trained") for run in runs],
        "total": [run.parameters.get("total") for run in runs],
    }
    present = {name: [value for value in values if value is not None] for name, values in known.items()}
    return {name: float(np.mean(values)) if values else None for name, values in present.items()}


def _run_row(member: Member, name: str, factors: Sequence[str], split: str) -> RunRow:
    run = member.run
    collapses = {name: captions.collapse for name, captions in member.captions.items() if captions.collapse}
    return RunRow(
        id=member.id,
        name=name,
        folder=str(run.path),
        group=member.group,
        factors=factor_values(run, factors),
        seed=seed_of(run),
        status=run.status,
        reason=run.reason,
        scores=run.scores,
        intervals={key: _ends(samples) for key, samples in member.samples.items() if key in run.scores},
        seconds=run.seconds,
        peak_memory_gib=run.peak_memory_gib,
        planned_gib=run.planned_gib,
        planned_fit_s=run.planned_fit_s,
        parameters=run.parameters,
        curve=run.curve,
        is_collapsed=bool(collapses.get(split) if split in member.captions else collapses),
        warnings=[*(f"{name}: {sentence}" for name, sentence in collapses.items()), *run.warnings],
        not_compared=member.not_compared,
        command=run.command,
        config=run.config,
        tokenizer=run.tokenizer,
        revision=run.revision,
    )


def _ends(samples: Resampled) -> tuple[float, float]:
    # Both ends of a 95 % interval.
    low, high = np.quantile(samples.single, [0.025, 0.975])
    return float(low), float(high)
