"""Captions of runs: reads prediction files, and chooses the clips that a report shows.

The chosen clips are those with the worst and the best mean score, those on which runs differ most, and random ones.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import numpy.typing as npt

from vlmcap.metrics import FactLexicon
from vlmcap.metrics.diversity import collapse_warning
from vlmcap.metrics.tokenizers import normalize
from vlmcap.reporting.report.records import CaptionRow, ClipRow, Mark, Reason

Floats = npt.NDArray[np.float64]

MAX_RUNS = 40
"""Number of runs whose captions are shown; of more runs, those of the best."""
MAX_CHARACTERS = 2000
"""Number of characters of a caption or reference that are shown."""
_PREFERRED = ("cider", "rouge_l", "bleu_4")


@dataclass(frozen=True, slots=True, eq=False)
class Captions:
    """Captions of a run for N clips, sorted by clip id.

    Attributes:
        ids: Clip ids.
        videos: Path or address of each video.
        texts: Caption of each clip.
        references: Reference captions of each clip.
        categories: Category of each clip; empty if it has none.
        scores: Scores of the clips by metric name, (N,), for metrics that every clip has.
        tokenizer: Tokenizer of the scores as stated in the file; empty if it is not.
        digest: Hash that is equal for files with the same clips and references.
        collapse: Warning about collapsed captions; None if they are varied.
    """

    ids: list[str]
    videos: list[str]
    texts: list[str]
    references: list[list[str]]
    categories: list[str]
    scores: dict[str, Floats]
    tokenizer: str
    digest: str
    collapse: str | None

    def __len__(self) -> int:
        return len(self.ids)


def read_captions(path: Path, warnings: list[str], shared: dict[str, str]) -> Captions | None:
    """Reads the captions of a file; returns None if it has none.

    Args:
        path: JSON lines as written by `train.py` and `evaluate.py`.
        warnings: List that receives sentences about skipped lines.
        shared: References read before, so that the equal references of runs are held in memory once.
    """
    entries: dict[str, dict[str, Any]] = {}
    num_broken = num_repeated = 0
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError:
        lines = []
    for number, line in enumerate(line for line in lines if line.strip()):
        entry = _entry(line)
        if entry is None:
            num_broken += 1
            continue
        # Files without ids, such as those of other programs, are matched by their order.
        name = str(entry.get("id", f"line {number + 1:06d}"))
        num_repeated += name in entries
        entries[name] = entry
    if num_broken:
        warnings.append(f"Skipped lines of {path.name} that cannot be read: {num_broken}.")
    if num_repeated:
        warnings.append(f"Clips that {path.name} contains more than once; the last line counts: {num_repeated}.")
    return _captions([(name, entries[name]) for name in sorted(entries)], shared) if entries else None


def _entry(line: str) -> dict[str, Any] | None:
    """Parses a line; returns None unless it has a caption and at least one reference."""
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    if not isinstance(entry, dict) or not isinstance(entry.get("prediction"), str):
        return None
    if isinstance(entry.get("references"), str):
        entry["references"] = [entry["references"]]
    is_list = isinstance(entry.get("references"), list) and all(isinstance(text, str) for text in entry["references"])
    return entry if is_list and entry["references"] else None


def _captions(entries: list[tuple[str, dict[str, Any]]], shared: dict[str, str]) -> Captions:
    texts = [entry["prediction"] for _, entry in entries]
    # Runs share their references, so each text is kept once in memory.
    references = [[shared.setdefault(text, text) for text in entry["references"]] for _, entry in entries]
    each = [entry["scores"] if isinstance(entry.get("scores"), dict) else {} for _, entry in entries]
    tokenizers = {str(entry.get("tokenizer") or "") for _, entry in entries}
    # Ids and references: two runs with the same digest were scored on the same clips.
    content = json.dumps([[name for name, _ in entries], references], ensure_ascii=True)
    return Captions(
        ids=[name for name, _ in entries],
        videos=[str(entry.get("video") or "") for _, entry in entries],
        texts=texts,
        references=references,
        categories=[str(entry.get("category") or "") for _, entry in entries],
        scores={
            name: np.array([scores[name] for scores in each], np.float64)
            for name in each[0]
            if _is_complete(name, each)
        },
        tokenizer=" and ".join(sorted(tokenizers)),
        digest=hashlib.sha256(content.encode()).hexdigest(),
        collapse=collapse_warning(texts),
    )


def _is_complete(name: str, each: list[dict[str, Any]]) -> bool:
    """Returns whether every clip has this score."""
    values = [scores.get(name) for scores in each]
    return all(isinstance(value, int | float) and math.isfinite(value) for value in values)


def find_clip_metric(runs: Sequence[Captions]) -> str:
    """Returns the metric that clips are chosen by, which all runs have; empty if there is none."""
    return next((name for name in _PREFERRED if runs and all(name in run.scores for run in runs)), "")


def choose_clips(
    runs: Mapping[str, Captions], metric: str, count: int, lexicon: FactLexicon | None = None
) -> list[ClipRow]:
    """Chooses clips, an equal share for each `Reason`, and returns them with the captions of all runs.

    Args:
        runs: Captions of the same clips by run id, best run first.
        metric: Metric of clips that all runs have.
        count: Maximum number of clips.
        lexicon: Facts that are marked in the texts.
    """
    if not runs or not metric or count < 1:
        return []
    # `runs` is in the order of the ranking.
    shown = dict(list(runs.items())[:MAX_RUNS])
    scores = np.stack([run.scores[metric] for run in shown.values()])  # (runs, clips)
    means, spreads = scores.mean(0), np.ptp(scores, axis=0)
    reasons = _choose(
        means, spreads, count, [name for name in get_args(Reason) if name != "different" or len(runs) > 1]
    )
    first = next(iter(shown.values()))
    return [
        ClipRow(
            id=first.ids[index],
            video=first.videos[index],
            references=[shown_text(text, lexicon) for text in first.references[index]],
            category=first.categories[index],
            chosen=why,
            score=float(means[index]),
            spread=float(spreads[index]),
            captions=[
                CaptionRow(
                    run=name,
                    text=shown_text(run.texts[index], lexicon),
                    scores={key: float(values[index]) for key, values in run.scores.items()},
                    marks=mark_facts(run.texts[index], first.references[index][0], lexicon),
                )
                for name, run in shown.items()
            ],
            reference_marks=mark_facts(first.references[index][0], first.references[index][0], lexicon),
        )
        for index, why in reasons.items()
    ]


def mark_facts(text: str, reference: str, lexicon: FactLexicon | None) -> list[Mark]:
    """Returns where the shown text states facts that the reference states too, in order and without overlaps."""
    if lexicon is None:
        return []
    stated, wanted, length = lexicon.extract(text), lexicon.extract(reference), len(shown_text(text, lexicon))
    spans_found = sorted(
        (start, end, fact)
        for fact, spans in lexicon.find(text).items()
        if wanted[fact] is not None
        for start, end, _ in spans
    )
    marks: list[Mark] = []
    for start, end, fact in spans_found:
        # Facts overlap if one phrase is part of another; the first one by position stays.
        if end <= min(length, MAX_CHARACTERS) and (not marks or start >= marks[-1][1]):
            marks.append((start, end, fact, stated[fact] == wanted[fact]))
    return marks


def _choose(means: Floats, spreads: Floats, count: int, names: Sequence[Reason]) -> dict[int, list[Reason]]:
    """Returns the reasons of each chosen clip; ties are broken by index, so the choice is reproducible."""
    orders: dict[Reason, npt.NDArray[np.intp]] = {
        "worst": np.argsort(means, kind="stable"),
        "best": np.argsort(-means, kind="stable"),
        "different": np.argsort(-spreads, kind="stable"),
        "random": np.random.default_rng(0).permutation(len(means)),
    }
    chosen: dict[int, list[Reason]] = {}
    for position, name in enumerate(names):
        share = count // len(names) + (position < count % len(names))  # the first reasons get the remainder
        for index in orders[name][:share].tolist():
            # Clips with equal scores in all runs do not differ.
            if name != "different" or spreads[index] > 0:
                chosen.setdefault(index, []).append(name)
    for index in orders["random"].tolist():  # fill up for clips that were chosen for two reasons
        if len(chosen) < count and index not in chosen:
            chosen[index] = ["random"]
    return chosen


def shown_text(text: str, lexicon: FactLexicon | None) -> str:
    """Truncates a long text; with a lexicon, normalizes it first, because marks refer to the normalized text."""
    text = text if lexicon is None else normalize(text)
    return text if len(text) <= MAX_CHARACTERS else f"{text[:MAX_CHARACTERS]}…"
