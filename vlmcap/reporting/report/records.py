"""Records of a report: the contract between the analysis of runs and the page, the tables and the pictures.

`Report.plain()` returns all of it in the types of JSON. Numbers that were not measured are None (null in JSON), and no
number is NaN or infinite. Metrics have the names of `summary.json`, such as `val/cider` and `test/facts/mean`. Runs and
groups are referred to by `id`. Both are in the order of the leaderboard, best first, those without the metric last.
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
"""Words that state a fact: start and end in code points, name of the fact, and whether the first reference agrees."""

COSTS = ("peak_memory_gib", "seconds", "trained")
"""Costs that scores are plotted against: peak memory in GiB, seconds of the whole run, trained parameters."""


@dataclass(frozen=True, slots=True)
class Note:
    """A note for the reader in English and Korean."""

    en: str
    ko: str


@dataclass(frozen=True, slots=True)
class RunRow:
    """One run.

    Attributes:
        id: Short id, which depends only on the folder.
        name: Name made of the values in which runs differ, such as `siglip2 + mlp, seed 1`.
        folder: Folder of the run.
        group: Id of the group of runs that differ only in their seed.
        factors: Values of the keys that differ between runs, without the seed; a group of YAML files such as `encoder`
            has the name of its file, other keys are dotted.
        seed: Seed; None if the configuration is missing.
        status: Status of the run; `unfinished` means that it is in progress or was killed.
        reason: One sentence; empty for a finished run.
        scores: All scores of `summary.json` or `metrics.json`.
        intervals: 95 % intervals over clips, for scores that are known per clip.
        seconds: `prepare`, `fit` and `total`, as far as known.
        peak_memory_gib: Measured peak memory.
        planned_gib: Planned peak memory.
        planned_fit_s: Planned seconds of training, including its validations.
        parameters: `total` and `trained`; empty if unknown.
        curve: Steps and values by metric (`train/loss`, `val/loss`, `val/cider` and so on), logged during training.
        is_collapsed: Whether the captions are nearly all the same or repeat themselves.
        warnings: Sentences about this run, in English, such as a collapse or unreadable files.
        not_compared: Why the run is not compared with others; empty if it is.
        command: Command that repeats the run in the folder of `train.py`.
        config: Whole configuration by dotted key; a list is one value.
        tokenizer: Name and version of the tokenizer of the scores.
        revision: Git revision of the code.
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
    """Difference of two scores.

    Attributes:
        value: Difference in the metric's own sign: below 0 is worse only if higher values are better.
        low: Lower end of the 95 % interval; None if `over` is empty, which means single seeds and no clips.
        high: Upper end of the 95 % interval.
        over: Sources of variation in the interval and the p-value.
        p_value: Two-sided p-value of the difference.
        adjusted_p_value: p-value after Holm's correction for the number of comparisons.
    """

    value: float
    low: float | None
    high: float | None
    over: Over
    p_value: float | None
    adjusted_p_value: float | None


@dataclass(frozen=True, slots=True)
class GroupRow:
    """Runs that differ only in their seed, which form one line of the leaderboard.

    Attributes:
        id: Short id.
        name: Name of its runs without the seed.
        factors: Factors of its runs.
        runs: Ids of all its runs, including those that failed.
        seeds: Seeds of the runs that have the metric.
        scores: Means over the runs, for every metric that all counted runs have.
        intervals: 95 % intervals, for metrics that have one.
        over: Sources of variation in these intervals.
        difference: Difference from the best group in the report's metric; None for the best group itself and for groups
            that are not compared with it.
        is_best: Whether the group has the best score among those compared.
        is_tied: Whether the group is the best or not significantly different from it: the adjusted p-value is at least
            0.05 or unknown.
        costs: Means over finished runs for `COSTS` and `total` (all parameters); None if unknown.
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
    is_tied: bool
    costs: dict[str, float | None]


@dataclass(frozen=True, slots=True)
class Level:
    """One value of a factor.

    Attributes:
        value: Value, such as `siglip2`.
        score: Mean over the counted groups.
        interval: 95 % interval; None if there is none.
        groups: Ids of the counted groups.
        difference: Difference from the best level over the same combinations of all other factors; None for the best
            level, and if no combinations match.
    """

    value: Value
    score: float
    interval: Ends | None
    groups: list[str]
    difference: Difference | None


@dataclass(frozen=True, slots=True)
class Effect:
    """Effect of a factor on the report's metric.

    Attributes:
        factor: Key of the factor.
        is_matched: Whether every level is averaged over the same combinations of all other factors. If not, the means
            also contain the effects of other factors.
        num_combinations: Number of combinations of the other factors that are counted.
        levels: Levels of the factor, best first.
    """

    factor: str
    is_matched: bool
    num_combinations: int
    levels: list[Level]


@dataclass(frozen=True, slots=True)
class Front:
    """Pareto front: groups that no other group beats at a lower or equal cost.

    Attributes:
        cost: One of `COSTS`.
        groups: Ids of the groups, cheapest first.
    """

    cost: str
    groups: list[str]


@dataclass(frozen=True, slots=True)
class CategoryRow:
    """Scores on the clips of one category, on the split of the report's metric.

    Attributes:
        name: Name of the category in the data.
        num_clips: Number of clips in the category; the largest one if runs differ.
        scores: Scores by run id and metric name (`cider`, `bleu_4`, `rouge_l`).
    """

    name: str
    num_clips: int
    scores: dict[str, dict[str, float]]


@dataclass(frozen=True, slots=True)
class CaptionRow:
    """Caption of a clip by one run, with the scores of this caption and marks of its facts, if facts are defined."""

    run: str
    text: str
    scores: dict[str, float]
    marks: list[Mark] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class OtherVideo:
    """Caption that a run generated from the video of another clip.

    Attributes:
        clip: Id or file of the other clip.
        text: Caption.
        marks: Facts of the caption compared with the reference of the original clip.
    """

    clip: str
    text: str
    marks: list[Mark]


@dataclass(frozen=True, slots=True)
class ClipRow:
    """One clip with the captions of all compared runs.

    Attributes:
        id: Id in the data set.
        video: Path or address of the video.
        references: Reference captions.
        category: Category; empty if the clip has none.
        chosen: Reasons why the clip is shown.
        score: Mean score over runs in `Report.clip_metric`.
        spread: Highest score minus lowest score.
        captions: Captions in the order of the leaderboard.
        thumbnails: Frames as base64-encoded JPEG files; empty if the video cannot be read.
        reference_marks: Facts of the first reference.
        other: On the page of a single run, its caption for another clip's video; None if there is no other clip.
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
    """A comparison of runs, or the results of a single run.

    Attributes:
        title: Title of the page.
        created: Local time, such as `2026-11-28 05:20`.
        version: Version of vlmcap.
        metric: Metric that runs are compared by, such as `val/cider`.
        metric_label: Readable name of the metric.
        is_higher_better: Whether higher values of the metric are better.
        clip_metric: Metric that clips are chosen and sorted by, a key of `CaptionRow.scores`.
        tokenizer: Tokenizer of the compared runs.
        num_clips: Number of clips that runs are compared on; 0 if no predictions were found.
        metrics: Metrics shown in the leaderboard, the report's metric first.
        factors: Keys that differ between runs, in the order in which names show them.
        runs: All runs.
        groups: All groups of runs.
        effects: Effect of each factor.
        fronts: Pareto front of each cost that is known.
        categories: Scores by category; empty if clips have no categories.
        clips: Chosen clips with captions.
        notes: Notes for the reader: how intervals are computed, and what is not shown.
        commands: Next commands by purpose on the page of a single run; empty on a page that compares runs.
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
        """Returns the report as dictionaries, lists, strings and numbers."""
        return asdict(self)
