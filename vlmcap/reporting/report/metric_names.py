"""Names of scores: which one runs are compared by, which stand beside it, and whether more is better."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from vlmcap.errors import UserError
from vlmcap.metrics import METRIC_LABELS
from vlmcap.reporting.report.folders import RunFolder

_LOWER = ("loss", "self_bleu", "repetition_rate")  # ends of names; of all others more is better
_BESIDE = ("cider", "bleu_4", "rouge_l", "meteor_ko", "content_f1", "facts/mean", "distinct_ratio")


def choose_metric(runs: Sequence[RunFolder], asked: str | None) -> str:
    """The metric that was asked for, else the runs' own objective, else CIDEr of the split that most have.

    Raises:
        UserError: No run has the metric, or any score at all.
    """
    counts = Counter(name for run in runs for name in run.scores)
    if not counts:
        told = next((f"; the first one: {run.reason}" for run in runs if run.reason), "")
        raise UserError(f"none of the {len(runs)} runs has a score yet{told}")
    if asked is not None:
        if asked not in counts:
            known = ", ".join(sorted(name for name in counts if "category/" not in name and "swapped" not in name)[:40])
            raise UserError(f"--metric {asked} is in none of the runs; choose one of {known}")
        return asked
    objectives = Counter(str(run.config["objective"]) for run in runs if run.config.get("objective") in counts)
    wanted = [*(name for name, _ in objectives.most_common(1)), "val/cider", "test/cider"]
    return max([name for name in wanted if name in counts] or [next(iter(counts))], key=lambda name: counts[name])


def is_higher_better(metric: str) -> bool:
    """Whether more of it is better."""
    return not metric.endswith(_LOWER)


def metric_label(metric: str) -> str:
    """For people: `val/cider` is "val: CIDEr (no length penalty)"."""
    split, _, name = metric.partition("/")
    return f"{split}: {METRIC_LABELS.get(name, name.replace('/', ', ').replace('_', ' '))}"


def columns(metric: str, runs: Sequence[RunFolder]) -> list[str]:
    """The metric, the usual ones of its split, and the metric itself and CIDEr of the other split, as far as any run has them."""
    split, _, name = metric.partition("/")
    other = {"val": "test", "test": "val"}.get(split, "")
    wanted = [metric, *(f"{split}/{one}" for one in _BESIDE), f"{other}/{name}", f"{other}/cider"]
    known = {key for run in runs for key in run.scores}
    return [key for key in dict.fromkeys(wanted) if key in known]
