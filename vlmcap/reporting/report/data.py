"""What a report holds: the contract between what reads and compares runs, and the page, the tables and the pictures made of it.

`Report.plain()` is all of it as JSON's types. Numbers that were not measured are None, in JSON null; no number is NaN
or infinite. Metrics have the names of `summary.json`: `val/cider`, `test/facts/mean`. Runs and groups are named by `id`
everywhere; both stand in the order of the leaderboard, best first, those without the metric last.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Status = Literal["finished", "failed", "refused", "pruned", "interrupted", "unfinished"]
Over = Literal["", "clips", "seeds", "clips and seeds"]
Reason = Literal["worst", "best", "different", "random"]
Value = str | int | float | bool | None
Ends = tuple[float, float]
Mark = tuple[int, int, str, bool]
"""Start and end in a text, in code points, of words that state a fact, its name, and whether that is what the first reference states."""

COSTS = ("peak_memory_gib", "seconds", "trained")
"""What a score is set against: GiB at the peak, seconds of the whole run, trained parameters."""


@dataclass(frozen=True, slots=True)
class Note:
    """A sentence in both languages."""

    en: str
    ko: str


@dataclass(frozen=True, slots=True)
class RunRow:
    """One run.

    Attributes:
        id: Short, the same whenever the same folder is read.
        name: What tells it from the others, such as `siglip2 + mlp, seed 1`.
        folder: As found, below what was given.
        group: The id of its group: the same configuration but for the seed.
        factors: Keys that differ between runs, the seed left out; a group of files (`encoder`) by its name, others by
            their dotted key.
        seed: None where no configuration was left.
        status: `unfinished` is a folder that says nothing of its end: it goes on, or was killed.
        reason: One sentence, empty for a finished run.
        scores: Everything in `summary.json` or `metrics.json`.
        intervals: Ends of the 95 % interval over clips, for scores whose clips are known.
        seconds: `prepare`, `fit`, `total`, as far as known.
        peak_memory_gib: Measured.
        planned_gib: What the plan said beforehand.
        planned_fit_s: Seconds of training and of the validations in it that the plan expects of what was trained.
        parameters: `total` and `trained`; empty if unknown.
        curve: Metric to steps and values, of the run's own course: `train/loss`, `val/loss`, `val/cider` and so on.
        is_collapsed: Whether its captions are all alike, or repeat themselves.
        warnings: Sentences about this run, in English: a collapse, torn files, why it is not compared.
        not_compared: Why it takes no part in comparisons, empty if it does.
        command: Repeats it, from the folder with `train.py`.
        config: All of its configuration, dotted key to value; a list is a value.
        tokenizer: Name and version, of its scores.
        revision: Of the code.
    """

    id: str
    name: str
    folder: str
    group: str
    factors: dict[str, Value]
    seed: int | None
    status: Status
    reason: str
    scores: dict[str, float]
    intervals: dict[str, Ends]
    seconds: dict[str, float]
    peak_memory_gib: float | None
    planned_gib: float | None
    planned_fit_s: float | None
    parameters: dict[str, int]
    curve: dict[str, list[tuple[int, float]]]
    is_collapsed: bool
    warnings: list[str]
    not_compared: str
    command: str
    config: dict[str, Any]
    tokenizer: str
    revision: str


@dataclass(frozen=True, slots=True)
class Difference:
    """One score less another.

    Attributes:
        value: The difference; its sign is the metric's own, so below 0 is worse only where higher is better.
        low: Lower end of its 95 % interval; None where `over` is empty: one seed each, and no clips.
        high: Upper end.
        over: What the interval and the p-value allow for.
        p_value: Of a difference at least as large, of either sign, if there were none.
        adjusted_p_value: The same after Holm's correction for the number of comparisons.
    """

    value: float
    low: float | None
    high: float | None
    over: Over
    p_value: float | None
    adjusted_p_value: float | None


@dataclass(frozen=True, slots=True)
class GroupRow:
    """Runs that differ in nothing but their seed: a line of the leaderboard.

    Attributes:
        id: Short.
        name: As of its runs, without the seed.
        factors: As of its runs.
        runs: Ids of its runs, whatever became of them.
        seeds: Of the runs that have the metric.
        scores: Means over the runs, of every metric that all finished ones have.
        intervals: Ends of 95 % intervals, of the metrics that have one.
        over: What those intervals allow for.
        difference: To the best group by the report's metric; None for the best itself and for what is not compared with
            it.
        is_best: Whether it has the best score among those compared.
        is_level: Whether it is the best or cannot be told from it: the adjusted p-value is 0.05 or more, or there is
            none.
        costs: Means over its finished runs under the names of `COSTS`, and `total`, all parameters; None where unknown.
    """

    id: str
    name: str
    factors: dict[str, Value]
    runs: list[str]
    seeds: list[int]
    scores: dict[str, float]
    intervals: dict[str, Ends]
    over: Over
    difference: Difference | None
    is_best: bool
    is_level: bool
    costs: dict[str, float | None]


@dataclass(frozen=True, slots=True)
class Level:
    """One value of a factor.

    Attributes:
        value: Such as `siglip2`.
        score: Mean over the groups counted.
        interval: Its ends, None where there is none.
        groups: Ids of the groups counted.
        difference: To the best level, over the same combinations of everything else; None for the best, and where
            nothing is matched.
    """

    value: Value
    score: float
    interval: Ends | None
    groups: list[str]
    difference: Difference | None


@dataclass(frozen=True, slots=True)
class Effect:
    """What a factor does to the report's metric.

    Attributes:
        factor: Key.
        is_matched: Whether every level is counted over the same combinations of all other factors. If not, levels are
            plain means, and what else differs between them is in those.
        num_combinations: Combinations of the other factors that are counted.
        levels: Best first.
    """

    factor: str
    is_matched: bool
    num_combinations: int
    levels: list[Level]


@dataclass(frozen=True, slots=True)
class Front:
    """Which groups no other beats at a lower or equal cost.

    Attributes:
        cost: One of `COSTS`.
        groups: Ids, cheapest first.
    """

    cost: str
    groups: list[str]


@dataclass(frozen=True, slots=True)
class CategoryRow:
    """Scores of the clips of one category, of the split of the report's metric.

    Attributes:
        name: As in the data.
        num_clips: Of the largest run.
        scores: Run id to metric (`cider`, `bleu_4`, `rouge_l`) to value.
    """

    name: str
    num_clips: int
    scores: dict[str, dict[str, float]]


@dataclass(frozen=True, slots=True)
class CaptionRow:
    """What one run said of a clip.

    `scores` are of this caption alone, and `marks` are there where the run knows facts.
    """

    run: str
    text: str
    scores: dict[str, float]
    marks: list[Mark] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class OtherVideo:
    """What a run said when it got the video of another clip.

    Attributes:
        clip: Id or file of the clip whose video it was.
        text: The caption.
        marks: Its facts, compared with the reference of the clip that the video was not of.
    """

    clip: str
    text: str
    marks: list[Mark]


@dataclass(frozen=True, slots=True)
class ClipRow:
    """One clip with the captions of all compared runs.

    Attributes:
        id: Of the data set.
        video: Its path or address.
        references: What people said.
        category: Empty if it has none.
        chosen: Why it is shown; one clip may be both.
        score: Mean of its scores over runs, by `Report.clip_metric`.
        spread: The highest less the lowest.
        captions: In the order of the leaderboard.
        thumbnails: Frames as base64 of JPEG; none if the video cannot be read.
        reference_marks: Facts of the first reference.
        other: On the page of one run, what it said of another clip's video; None where there is no other clip.
    """

    id: str
    video: str
    references: list[str]
    category: str
    chosen: list[Reason]
    score: float
    spread: float
    captions: list[CaptionRow]
    thumbnails: list[str] = field(default_factory=list)
    reference_marks: list[Mark] = field(default_factory=list)
    other: OtherVideo | None = None


@dataclass(frozen=True, slots=True)
class Report:
    """Everything.

    Attributes:
        title: One line.
        created: Local time, `2026-11-28 05:20`.
        version: Of vlmcap.
        metric: By which runs are compared, such as `val/cider`.
        metric_label: For people.
        is_higher_better: Of the metric.
        clip_metric: By which clips are chosen and sorted: a key of `CaptionRow.scores`.
        tokenizer: Of the compared runs.
        num_clips: On which they are compared; 0 where no predictions were found.
        metrics: Columns of the leaderboard, the metric first.
        factors: Keys that differ between runs, in the order in which names show them.
        runs: See `RunRow`.
        groups: See `GroupRow`.
        effects: One a factor.
        fronts: One a cost that is known.
        categories: Empty where clips have none.
        clips: A choice.
        notes: What a reader has to know: how intervals are made, what was left out.
        commands: On the page of one run, the commands to go on, by their purpose; empty on a page that compares runs.
    """

    title: str
    created: str
    version: str
    metric: str
    metric_label: str
    is_higher_better: bool
    clip_metric: str
    tokenizer: str
    num_clips: int
    metrics: list[str]
    factors: list[str]
    runs: list[RunRow]
    groups: list[GroupRow]
    effects: list[Effect]
    fronts: list[Front]
    categories: list[CategoryRow]
    clips: list[ClipRow]
    notes: list[Note]
    commands: dict[str, str] = field(default_factory=dict)

    def plain(self) -> dict[str, Any]:
        """The report as dictionaries, lists, texts and numbers."""
        return asdict(self)


def config_difference(first: dict[str, Any], second: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Keys of two flat configurations whose values differ, with both values.

    None stands for a key that one of them lacks.
    """
    keys = [*first, *(key for key in second if key not in first)]
    return {key: (first.get(key), second.get(key)) for key in keys if first.get(key) != second.get(key)}
