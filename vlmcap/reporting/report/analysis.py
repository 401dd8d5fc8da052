"""From run folders to a `Report`."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from vlmcap.metrics.clip_metrics import ClipMetric
from vlmcap.reporting.report.captions import Captions, Floats, read_captions
from vlmcap.reporting.report.clips import choose_clips, find_clip_metric
from vlmcap.reporting.report.data import COSTS, Front, GroupRow, Report
from vlmcap.reporting.report.effects import find_effects
from vlmcap.reporting.report.folders import RunFolder
from vlmcap.reporting.report.metric_names import choose_metric, columns, is_higher_better, metric_label
from vlmcap.reporting.report.naming import find_factors
from vlmcap.reporting.report.notes import make_notes
from vlmcap.reporting.report.rows import Member, find_categories, group_rows, identify, run_rows
from vlmcap.reporting.report.scoring import comparable, resample, score_clips

Advance = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is asked of a report.

    Attributes:
        metric: Such as `val/cider`; None for the runs' own objective.
        title: None for the names of the folders.
        clips: At most, with captions side by side.
        tokenizer: Scores everything anew by this one; None keeps the scores that the runs have.
    """

    metric: str | None = None
    title: str | None = None
    clips: int = 40
    tokenizer: str | None = None


def analyse(runs: Sequence[RunFolder], wanted: Wanted, *, version: str, advance: Advance = lambda: None) -> Report:
    """The report of some runs, but for the thumbnails.

    Args:
        runs: At least one, as read.
        wanted: Metric and sizes.
        version: Of vlmcap.
        advance: Called once a run.

    Raises:
        UserError: No run has the metric.
    """
    metric = choose_metric(runs, wanted.metric)
    split, _, name = metric.partition("/")
    captions = _read_captions(runs, split, name, wanted.tokenizer, advance)
    has_metric = [metric in run.scores for run in runs]
    why = iter(comparable(name, [captions[index].texts.get(split) for index in range(len(runs)) if has_metric[index]]))
    factors = find_factors(runs)
    members = identify(
        [
            Member(run, found.texts, found.samples, next(why) if has else "", has)
            for run, found, has in zip(runs, captions, has_metric, strict=True)
        ],
        factors,
        metric,
        is_higher_better=is_higher_better(metric),
    )
    shown = columns(metric, runs)
    groups, estimator = group_rows(members, factors, metric, shown, is_higher_better=is_higher_better(metric))
    ranked = {group.id: group.factors for group in groups if group.is_best or group.difference is not None}
    rows = run_rows(members, groups, factors, split)
    compared = {member.id: member.captions[split] for member in members if member.is_compared and split in member.captions}
    clip_metric = find_clip_metric(list(compared.values()))
    some = next(iter(compared.values()), None)
    return Report(
        title=wanted.title or _title(runs),
        created=datetime.datetime.now().strftime("%Y-%m-%d %H:%M"),
        version=version,
        metric=metric,
        metric_label=metric_label(metric),
        is_higher_better=is_higher_better(metric),
        clip_metric=clip_metric,
        tokenizer=some.tokenizer if some else next((run.tokenizer for run in runs if run.tokenizer), ""),
        num_clips=len(some) if some else 0,
        metrics=shown,
        factors=factors,
        runs=rows,
        groups=groups,
        effects=find_effects(factors, ranked, estimator, is_higher_better=is_higher_better(metric)),
        fronts=find_fronts([group for group in groups if group.id in ranked], metric, is_higher_better=is_higher_better(metric)),
        categories=find_categories(members, split),
        clips=choose_clips(compared, clip_metric, wanted.clips),
        notes=make_notes(rows, groups, metric),
    )


def find_fronts(groups: Sequence[GroupRow], metric: str, *, is_higher_better: bool) -> list[Front]:
    """For each cost that two groups know: those that no other beats at a lower or equal cost."""
    fronts = []
    for cost in COSTS:
        known = [(value, group.scores[metric], group.id) for group in groups if (value := group.costs.get(cost)) is not None]
        if len(known) < 2:
            continue
        sign = 1 if is_higher_better else -1
        best, front = -np.inf, []
        for _, score, name in sorted(known, key=lambda row: (row[0], -sign * row[1])):
            if sign * score > best:
                best = sign * score
                front.append(name)
        fronts.append(Front(cost, front))
    return fronts


@dataclass(slots=True)
class _Found:
    """Captions of each split, and resampled scores by their whole name."""

    texts: dict[str, Captions] = field(default_factory=dict)
    samples: dict[str, Floats] = field(default_factory=dict)


def _read_captions(runs: Sequence[RunFolder], split: str, name: str, tokenizer: str | None, advance: Advance) -> list[_Found]:
    found = [_Found() for _ in runs]
    shared: dict[str, str] = {}
    scored: dict[str, dict[int, Mapping[str, ClipMetric]]] = {}
    for index, run in enumerate(runs):
        for own_split, path in run.predictions.items():
            captions = read_captions(path, run.warnings, shared)
            if captions is not None:
                captions, metrics = score_clips(run, own_split, captions, name if own_split == split else "", tokenizer)
                found[index].texts[own_split] = captions
                scored.setdefault(own_split, {})[index] = metrics
        advance()
    for own_split, those in scored.items():
        sets = [found[index].texts[own_split].digest for index in those]
        for index, samples in zip(those, resample(list(those.values()), sets), strict=True):
            found[index].samples |= {f"{own_split}/{one}": values for one, values in samples.items()}
    return found


def _title(runs: Sequence[RunFolder]) -> str:
    parents = dict.fromkeys(run.path.parent for run in runs)
    if len(runs) == 1:
        return str(runs[0].path)
    return ", ".join(str(Path(*parent.parts[-3:])) for parent in list(parents)[:3]) + (" …" if len(parents) > 3 else "")
