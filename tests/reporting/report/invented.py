"""A synthetic report for tests of its page, with every field filled and hostile text in all texts of users."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vlmcap.reporting.report.records import (
    CaptionRow,
    CategoryRow,
    ClipRow,
    Difference,
    Effect,
    Front,
    GroupRow,
    Level,
    Note,
    Reason,
    Report,
    RunRow,
)

HOSTILE = '<img src=x onerror="window.broken=1"></script><script>window.broken=1</script> &amp; \u2028 빨간 연'
METRIC = "val/cider"
_REASONS: tuple[Reason, ...] = ("worst", "best", "different", "random")


def make_run(name: str, group: str, factors: dict[str, Any], score: float | None, **changes: Any) -> RunRow:
    """A finished run; without a score, one that failed."""
    finished: dict[str, Any] = dict(
        id=name,
        name=f"{' + '.join(map(str, factors.values()))}, seed {name[-1]}",
        folder=f"multirun/{name}",
        group=group,
        factors=factors,
        seed=int(name[-1]),
        status="finished" if score is not None else "failed",
        reason="" if score is not None else f"the loss became NaN {HOSTILE}",
        scores={} if score is None else {METRIC: score, "val/bleu_4": score / 10},
        intervals={} if score is None else {METRIC: (score - 0.2, score + 0.2)},
        seconds={} if score is None else {"fit": 500.0, "total": 4000 / (score + 1)},
        peak_memory_gib=None if score is None else 3 + 2 * score,
        planned_gib=12.5,
        planned_fit_s=450.0,
        parameters={} if score is None else {"total": 400_000_000, "trained": 20_000_000},
        curve={
            "train/loss": [(step, 4 / step + 0.1 * (score or 0)) for step in range(1, 40)],
            METRIC: [(20, 0.5), (39, score or 0.0)],
        },
        is_collapsed=False,
        warnings=[],
        not_compared="",
        command=f"python train.py encoder={factors['encoder']} seed={name[-1]}",
        config={
            "encoder.name": factors["encoder"],
            "seed": int(name[-1]),
            "data.root": "data/clips",
            "llm.layers": [1, 2],
        },
        tokenizer="mecab_ko 1.0.3",
        revision="0123456789ab",
    )
    return RunRow(**(finished | changes))


def make_group(
    name: str, factors: dict[str, Any], runs: Sequence[RunRow], *, is_best: bool = False, is_tied: bool = False
) -> GroupRow:
    """A group with the means of its runs."""
    done = [run for run in runs if METRIC in run.scores]
    means = {key: sum(run.scores[key] for run in done) / len(done) for key in (METRIC, "val/bleu_4")} if done else {}
    p_value = 0.4 if is_tied else 0.0005
    difference = (
        Difference(means[METRIC] - 3, means[METRIC] - 3.3, means[METRIC] - 2.7, "clips and seeds", p_value, p_value)
        if done
        else None
    )
    costs: dict[str, float | None] = {"peak_memory_gib": None, "seconds": None, "trained": None, "total": None}
    if done:
        costs = {
            "peak_memory_gib": done[0].peak_memory_gib,
            "seconds": done[0].seconds["total"],
            "trained": 2e7,
            "total": 4e8,
        }
    return GroupRow(
        id=name,
        name=" + ".join(map(str, factors.values())),
        factors=factors,
        runs=[run.id for run in runs],
        seeds=[run.seed or 0 for run in done],
        scores=means,
        intervals={METRIC: (means[METRIC] - 0.3, means[METRIC] + 0.3)} if done else {},
        over="clips and seeds" if done else "",
        difference=None if is_best else difference,
        is_best=is_best,
        is_tied=is_tied or is_best,
        costs=costs,
    )


def make_clips(runs: Sequence[RunRow], count: int, videos: Sequence[str] = ()) -> list[ClipRow]:
    """Makes clips; the first one has a hostile and an empty caption, and only the first ones have existing `videos`."""
    rows = []
    for index in range(count):
        texts = [f"파란 연 {number} 개가 하늘에 천천히 움직인다. 클립{index:03d}" for number in range(len(runs))]
        texts[0] = HOSTILE if index == 0 else texts[0]
        texts[-1] = "" if index == 0 else texts[-1]
        score = 1.0 + index / 10
        captions = [
            CaptionRow(run.id, text, {"cider": score + number / 10})
            for number, (run, text) in enumerate(zip(runs, texts, strict=True))
        ]
        video = videos[index] if index < len(videos) else f"lost/{index:03d}.mp4"
        chosen = [_REASONS[index % 4]]
        references = ["빨간 연 하나가 하늘에서 천천히 움직인다.", HOSTILE]
        rows.append(
            ClipRow(
                f"clip_{index:03d}",
                video,
                references,
                ("바다", "도시")[index % 2],
                chosen,
                score,
                0.1 * len(runs),
                captions,
            )
        )
    return rows


def make_report(
    *,
    num_clips: int = 24,
    videos: Sequence[str] = (),
    seeds: int = 2,
    encoders: Sequence[str] = ("siglip2", "dinov3", "clip"),
) -> Report:
    """Makes a report of encoders by seeds, in descending order of scores, the second tied with the best, one failed."""
    runs, groups = [], []
    for place, encoder in enumerate(encoders):
        factors = {"encoder": encoder, "projector": "mlp"}
        each = [
            make_run(f"r{place}{seed}", f"g{place}", factors, 3 - 0.9 * place / len(encoders) * 3 + 0.01 * seed)
            for seed in range(seeds)
        ]
        if place == 2:
            each[0] = make_run(
                each[0].id,
                "g2",
                factors,
                each[0].scores[METRIC],
                is_collapsed=True,
                warnings=["all captions are alike"],
            )
        runs += each
        groups.append(make_group(f"g{place}", factors, each, is_best=place == 0, is_tied=place == 1))
    lost = {"encoder": "clip", "projector": HOSTILE}
    failed = make_run("rx0", "gx", lost, None)
    finished = list(runs)
    levels = [
        Level(group.factors["encoder"], group.scores[METRIC], group.intervals[METRIC], [group.id], group.difference)
        for group in groups
    ]
    return Report(
        title=f"encoders {HOSTILE}",
        created="2026-11-28 05:20",
        version="0.1.0",
        metric=METRIC,
        metric_label="val: CIDEr (no length penalty)",
        is_higher_better=True,
        clip_metric="cider",
        tokenizer="mecab_ko 1.0.3",
        num_clips=num_clips,
        metrics=[METRIC, "val/bleu_4"],
        factors=["encoder", "projector"],
        runs=[*runs, failed],
        groups=[*groups, make_group("gx", lost, [failed])],
        effects=[Effect("encoder", True, 1, levels)],
        fronts=[Front("peak_memory_gib", ["g2", "g1", "g0"]), Front("seconds", ["g0"]), Front("trained", ["g0"])],
        categories=[
            CategoryRow(name, 12, {run.id: {"cider": run.scores[METRIC]} for run in finished})
            for name in ("바다", HOSTILE)
        ],
        clips=make_clips(finished, num_clips, videos),
        notes=[Note("Intervals account for the choice of clips.", "구간은 클립 선택을 고려합니다.")],
    )
