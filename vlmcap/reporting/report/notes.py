"""What a reader of a report has to know, in both languages."""

from __future__ import annotations

from collections.abc import Sequence

from vlmcap.reporting.report.clips import MOST_RUNS
from vlmcap.reporting.report.data import GroupRow, Note, RunRow

_OVER = {
    "clips and seeds": Note(
        "Intervals (95 %) allow for the choice of clips (bootstrap) and for the seeds (Student's t, Welch); a configuration with one "
        "seed is given the seed variance of the others.",
        "구간(95 %)은 클립 선택(부트스트랩)과 시드(스튜던트 t, Welch)를 함께 고려합니다. "
        "시드가 하나뿐인 구성에는 다른 구성들의 시드 분산을 씁니다.",
    ),
    "clips": Note(
        "Intervals (95 %) allow for the choice of clips alone (paired bootstrap). Every configuration has one seed: another seed may move "
        "a score by more than that.",
        "구간(95 %)은 클립 선택만 고려합니다(쌍체 부트스트랩). "
        "구성마다 시드가 하나뿐이므로 다른 시드에서는 점수가 구간보다 크게 달라질 수 있습니다.",
    ),
    "seeds": Note(
        "Intervals (95 %) allow for the seeds alone (Student's t, Welch): this score is not made of scores of clips, or captions are "
        "missing.",
        "구간(95 %)은 시드만 고려합니다(스튜던트 t, Welch). 이 점수는 클립별 점수로 이루어지지 않거나 캡션 파일이 없습니다.",
    ),
    "": Note(
        "No interval is known: one seed each, and no scores of clips.",
        "구성마다 시드가 하나이고 클립별 점수가 없어 구간을 알 수 없습니다.",
    ),
}


def make_notes(runs: Sequence[RunRow], groups: Sequence[GroupRow], metric: str) -> list[Note]:
    """The notes of a report, the most important first."""
    best = next((group for group in groups if group.is_best), None)
    over = next((group.difference.over for group in groups if group.difference), best.over if best else "")
    notes = [_OVER[over]]
    tested = sum(group.difference is not None for group in groups)
    if tested:
        notes.append(
            Note(
                f"p-values are two-sided and Holm-corrected for {tested} comparisons with the best. The best was chosen by the same "
                "numbers, so its lead is a little too large; a fresh split shows the true one.",
                f"p 값은 양측이며 최고 구성과의 비교 {tested}건에 대해 Holm 보정했습니다. 최고 구성을 같은 점수로 골랐으므로 차이가 조금 "
                "크게 보일 수 있습니다. 다른 분할에서 확인하세요.",
            )
        )
    return [*notes, *_about_runs(runs, metric)]


def _about_runs(runs: Sequence[RunRow], metric: str) -> list[Note]:
    notes = []
    if left_out := sum(bool(run.not_compared) for run in runs):
        notes.append(
            Note(
                f"Runs with {metric} that are not compared: {left_out}. Their clips, references or tokeniser are others, as each says.",
                f"{metric} 점수가 있는 실행 {left_out}개는 클립, 참조 또는 토크나이저가 달라 비교하지 않습니다. 이유는 각 실행에 있습니다.",
            )
        )
    if failed := sum(metric not in run.scores for run in runs):
        notes.append(
            Note(
                f"Runs without {metric}, which failed, were refused or did not end: {failed}.",
                f"실행 {failed}개에는 {metric} 점수가 없습니다. 실패했거나 거부되었거나 끝나지 않았습니다.",
            )
        )
    if any(run.config.get("hardware.accelerator") == "cpu" for run in runs):
        notes.append(
            Note(
                "Peak memory of a run on a CPU is that of its process, earlier jobs of the same sweep included.",
                "CPU 실행의 최대 메모리는 프로세스 전체 값이며 같은 스윕의 앞선 작업도 포함합니다.",
            )
        )
    if sum(metric in run.scores and not run.not_compared for run in runs) > MOST_RUNS:
        notes.append(Note(f"Captions are those of the {MOST_RUNS} best runs.", f"캡션은 상위 {MOST_RUNS}개 실행의 것입니다."))
    return notes
