"""Which clips a report shows: those that all runs get wrong, that all get right, that they differ on, and some at random."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast, get_args

import numpy as np
import numpy.typing as npt

from vlmcap.reporting.report.captions import Captions, Floats
from vlmcap.reporting.report.data import CaptionRow, ClipRow, Reason

MOST_RUNS = 40
"""Whose captions are shown; of more runs, the best ones."""
MOST_CHARACTERS = 2000
"""Of a caption or reference that is shown."""
_PREFERRED = ("cider", "rouge_l", "bleu_4")


def find_clip_metric(runs: Sequence[Captions]) -> str:
    """The score by which clips are chosen, which every run has for every clip; empty where there is none."""
    return next((name for name in _PREFERRED if runs and all(name in run.scores for run in runs)), "")


def choose_clips(runs: Mapping[str, Captions], metric: str, count: int) -> list[ClipRow]:
    """Up to `count` clips with the captions of all runs, a quarter for each `Reason`.

    Args:
        runs: Run id to its captions, best run first, all of the same clips.
        metric: A score of clips that all runs have.
        count: At most; 0 for none.
    """
    if not runs or not metric or count < 1:
        return []
    shown = dict(list(runs.items())[:MOST_RUNS])
    scores = np.stack([run.scores[metric] for run in shown.values()])  # (runs, clips)
    means, spreads = scores.mean(0), np.ptp(scores, axis=0)
    reasons = _choose(means, spreads, count)
    first = next(iter(shown.values()))
    return [
        ClipRow(
            id=first.ids[index],
            video=first.videos[index],
            references=[_cut(text) for text in first.references[index]],
            category=first.categories[index],
            chosen=why,
            score=float(means[index]),
            spread=float(spreads[index]),
            captions=[
                CaptionRow(name, _cut(run.texts[index]), {key: float(values[index]) for key, values in run.scores.items()})
                for name, run in shown.items()
            ],
        )
        for index, why in reasons.items()
    ]


def _choose(means: Floats, spreads: Floats, count: int) -> dict[int, list[Reason]]:
    """Clip to why it is chosen, in the order of reasons; ties go by place, so that the choice is the same each time."""
    names = cast(tuple[Reason, ...], get_args(Reason))
    orders: dict[Reason, npt.NDArray[np.intp]] = {
        "worst": np.argsort(means, kind="stable"),
        "best": np.argsort(-means, kind="stable"),
        "different": np.argsort(-spreads, kind="stable"),
        "random": np.random.default_rng(0).permutation(len(means)),
    }
    chosen: dict[int, list[Reason]] = {}
    for place, name in enumerate(names):
        share = count // len(names) + (place < count % len(names))
        for index in orders[name][:share].tolist():
            if name != "different" or spreads[index] > 0:
                chosen.setdefault(index, []).append(name)
    return chosen


def _cut(text: str) -> str:
    return text if len(text) <= MOST_CHARACTERS else f"{text[:MOST_CHARACTERS]}…"
