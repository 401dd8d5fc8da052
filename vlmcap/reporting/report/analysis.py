"""Compares runs: builds a `Report` from run folders."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from vlmcap.metrics.clip_metrics import ClipMetric
from vlmcap.metrics.significance import Resampled
from vlmcap.reporting.report.captions import MAX_RUNS, Captions, choose_clips, find_clip_metric, read_captions
from vlmcap.reporting.report.estimates import find_effects
from vlmcap.reporting.report.folders import RunFolder
from vlmcap.reporting.report.naming import choose_metric, columns, find_factors, is_higher_better, metric_label
from vlmcap.reporting.report.records import COSTS, Front, GroupRow, Note, Report, RunRow
from vlmcap.reporting.report.rows import Member, find_categories, group_rows, identify, run_rows
from vlmcap.reporting.report.scoring import comparable, find_lexicon, resample, score_clips

Advance = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Wanted:
    """Options of a report.

    Attributes:
        metric: Metric that runs are compared by, such as `val/cider`; None for the one that the runs monitored.
        title: Title of the page; None for the names of the folders.
        clips: Maximum number of clips shown with captions side by side.
        tokenizer: Tokenizer that scores all captions again; None keeps the scores of the runs.
    """

    metric: str | None = None
    title: str | None = None
    clips: int = 40
    tokenizer: str | None = None


def analyse(runs: Sequence[RunFolder], wanted: Wanted, *, version: str, advance: Advance = lambda: None) -> Report:
    """Builds the report of runs, without thumbnails.

    Args:
        runs: At least one run.
        wanted: Options of the report.
        version: Version of vlmcap.
        advance: Callback called once per run, for a progress bar.

    Raises:
        UserError: No run has the metric.
    """
    metric = choose_metric(runs, wanted.metric)
    split, _, name = metric.partition("/")
    captions = _read_captions(runs, split, name, wanted.tokenizer, advance)
    # 1. Which runs can be compared: those with the metric, on the clips, references and tokenizer of most of them.
    has_metric = [metric in run.scores for run in runs]
    texts = [one.texts.get(split) for one, has in zip(captions, has_metric, strict=True) if has]
    # Reasons for the runs with the metric only, in their order.
    why_not = iter(comparable(name, texts))
    members = [
        Member(run, one.texts, one.samples, next(why_not) if has else "", has)
        for run, one, has in zip(runs, captions, has_metric, strict=True)
    ]
    factors, is_higher = find_factors(runs), is_higher_better(metric)
    members = identify(members, factors, metric, is_higher_better=is_higher)
    # 2. Runs that differ only in their seed form a group; groups are ranked and tested against the best one.
    shown = columns(metric, runs)
    groups, estimator = group_rows(members, factors, metric, shown, is_higher_better=is_higher)
    # Effects and fronts are about the groups that are compared.
    ranked = {group.id: group.factors for group in groups if group.is_best or group.difference is not None}
    rows = run_rows(members, groups, factors, split)
    # 3. Captions side by side, which need runs with the same clips.
    compared = {
        member.id: member.captions[split] for member in members if member.is_compared and split in member.captions
    }
    clip_metric = find_clip_metric(list(compared.values()))
    first = next(iter(compared.values()), None)
    return Report(
        title=wanted.title or _title(runs),
        created=datetime.datetime.now().strftime("%Y-%m-%d %H:%M"),
        version=version,
        metric=metric,
        metric_label=metric_label(metric),
        is_higher_better=is_higher,
        clip_metric=clip_metric,
        tokenizer=first.tokenizer if first else next((run.tokenizer for run in runs if run.tokenizer), ""),
        num_clips=len(first) if first else 0,
        metrics=shown,
        factors=factors,
        runs=rows,
        groups=groups,
        effects=find_effects(factors, ranked, estimator, is_higher_better=is_higher),
        fronts=find_fronts([group for group in groups if group.id in ranked], metric, is_higher_better=is_higher),
        categories=find_categories(members, split),
        clips=choose_clips(compared, clip_metric, wanted.clips, find_lexicon(runs)),
        notes=make_notes(rows, groups, metric),
    )


def find_fronts(groups: Sequence[GroupRow], metric: str, *, is_higher_better: bool) -> list[Front]:
    """Returns the Pareto front of each cost that is known for at least two groups."""
    fronts = []
    for cost in COSTS:
        known = [
            (value, group.scores[metric], group.id) for group in groups if (value := group.costs.get(cost)) is not None
        ]
        if len(known) < 2:
            continue
        sign = 1 if is_higher_better else -1
        # From the cheapest group on, a group is on the front if it is better than all cheaper ones.
        best, front = -np.inf, []
        # Of equal costs, the better score comes first.
        for _, score, name in sorted(known, key=lambda point: (point[0], -sign * point[1])):
            if sign * score > best:
                best = sign * score
                front.append(name)
        fronts.append(Front(cost, front))
    return fronts


@dataclass(slots=True)
class _RunCaptions:
    """Captions of each split, and resampled scores by name with split."""

    texts: dict[str, Captions] = field(default_factory=dict)
    samples: dict[str, Resampled] = field(default_factory=dict)


def _read_captions(
    runs: Sequence[RunFolder], split: str, name: str, tokenizer: str | None, advance: Advance
) -> list[_RunCaptions]:
    results = [_RunCaptions() for _ in runs]
    shared: dict[str, str] = {}
    scored: dict[str, dict[int, Mapping[str, ClipMetric]]] = {}
    for index, run in enumerate(runs):
        for file_split, path in run.predictions.items():
            captions = read_captions(path, run.warnings, shared)
            if captions is not None:
                captions, metrics = score_clips(
                    run, file_split, captions, name if file_split == split else "", tokenizer
                )
                results[index].texts[file_split] = captions
                scored.setdefault(file_split, {})[index] = metrics
        advance()
    # Runs with the same clips and references are resampled together, so that their scores can be compared in pairs.
    # Equal digests stand for equal clips and references.
    for file_split, metrics_of in scored.items():
        sets = [results[index].texts[file_split].digest for index in metrics_of]
        for index, samples in zip(metrics_of, resample(list(metrics_of.values()), sets), strict=True):
            results[index].samples |= {f"{file_split}/{one}": values for one, values in samples.items()}
    return results


def _title(runs: Sequence[RunFolder]) -> str:
    parents = dict.fromkeys(run.path.parent for run in runs)
    if len(runs) == 1:
        return str(runs[0].path)
    # The last three parts of each folder, such as "multirun/2026-11-28/05-20-11".
    return ", ".join(str(Path(*parent.parts[-3:])) for parent in list(parents)[:3]) + (" …" if len(parents) > 3 else "")


_OVER = {
    "clips and seeds": Note(
        "The 95 % intervals account for the choice of clips (bootstrap) and for the seeds (Student's t, Welch). A "
        "configuration with a single seed uses the seed variance of the others.",
        "95 % 구간은 클립 선택(부트스트랩)과 시드(스튜던트 t, Welch)를 함께 고려합니다. "
        "시드가 하나뿐인 구성에는 다른 구성들의 시드 분산을 사용합니다.",
    ),
    "clips": Note(
        "The 95 % intervals account only for the choice of clips (paired bootstrap). Every configuration has a single "
        "seed, and another seed may change a score by more than its interval.",
        "95 % 구간은 클립 선택만 고려합니다(쌍체 부트스트랩). "
        "구성마다 시드가 하나뿐이므로 다른 시드에서는 점수가 구간보다 크게 달라질 수 있습니다.",
    ),
    "seeds": Note(
        "The 95 % intervals account only for the seeds (Student's t, Welch), because this score is not computed per "
        "clip or captions are missing.",
        "95 % 구간은 시드만 고려합니다(스튜던트 t, Welch). 이 점수는 클립별로 계산되지 않거나 캡션 파일이 없습니다.",
    ),
    "": Note(
        "There are no intervals, because every configuration has a single seed and no scores per clip.",
        "구성마다 시드가 하나이고 클립별 점수가 없어 구간을 구할 수 없습니다.",
    ),
}


def make_notes(runs: Sequence[RunRow], groups: Sequence[GroupRow], metric: str) -> list[Note]:
    """Returns the notes of a report, most important first."""
    best = next((group for group in groups if group.is_best), None)
    over = next((group.difference.over for group in groups if group.difference), best.over if best else "")
    notes = [_OVER[over]]
    tested = sum(group.difference is not None for group in groups)
    if tested:
        notes.append(
            Note(
                f"The p-values are two-sided and Holm-corrected for {tested} comparisons with the best configuration. "
                "As it was chosen by the same scores, its lead is slightly overestimated; confirm it on another split.",
                f"p 값은 양측이며 최고 구성과의 비교 {tested}건에 대해 Holm 보정했습니다. 최고 구성을 같은 점수로 "
                "골랐으므로 차이가 조금 크게 보일 수 있습니다. 다른 분할에서 확인하세요.",
            )
        )
    return [*notes, *_about_runs(runs, metric)]


def _about_runs(runs: Sequence[RunRow], metric: str) -> list[Note]:
    notes = []
    if left_out := sum(bool(run.not_compared) for run in runs):
        notes.append(
            Note(
                f"Runs with {metric} that are not compared: {left_out}. Their clips, references or tokenizer differ; "
                "each run gives the reason.",
                f"{metric} 점수가 있는 실행 {left_out}개는 클립, 참조 또는 토크나이저가 달라 비교하지 않습니다. "
                "이유는 각 실행에 있습니다.",
            )
        )
    if failed := sum(metric not in run.scores for run in runs):
        notes.append(
            Note(
                f"Runs without {metric} because they failed, were refused or did not end: {failed}.",
                f"실행 {failed}개에는 {metric} 점수가 없습니다. 실패했거나 거부되었거나 끝나지 않았습니다.",
            )
        )
    if any(run.config.get("hardware.accelerator") == "cpu" for run in runs):
        notes.append(
            Note(
                "The peak memory of a CPU run is that of its process, including earlier jobs of the same sweep.",
                "CPU 실행의 최대 메모리는 프로세스 전체 값이며 같은 스윕의 앞선 작업도 포함합니다.",
            )
        )
    if sum(metric in run.scores and not run.not_compared for run in runs) > MAX_RUNS:
        notes.append(
            Note(
                f"Only captions of the {MAX_RUNS} best runs are shown.", f"상위 {MAX_RUNS}개 실행의 캡션만 표시합니다."
            )
        )
    return notes
