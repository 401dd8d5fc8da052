"""How often intervals hold the true score, and how often equal runs are called different, by simulation.

    python benchmarks/metrics/coverage.py benchmarks/metrics/coverage.json    # some three minutes of one core

Test sets of 30, 100 and 300 clips are drawn from populations whose mean is known. The intervals are nominally 95 % and
take 1000 resamples each; equal runs are compared at the level 0.05. docs/explanation/korean_scores.md has the figures.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from vlmcap.metrics.clip_metrics import mean_metric
from vlmcap.metrics.significance import resampled, resampled_sums

Floats = npt.NDArray[np.float64]
Draw = Callable[[int, np.random.Generator], Floats]

NUM_CLIPS = (30, 100, 300)
TRIALS, RESAMPLES, LEVEL = 1000, 1000, 0.05

SCORES: dict[str, Draw] = {
    "exponential": lambda clips, rng: rng.exponential(size=clips),
    "lognormal": lambda clips, rng: rng.lognormal(size=clips),
    "CIDEr of long captions": lambda clips, rng: np.minimum(10, rng.gamma(0.35, 1.5, clips)),  # many near 0, few high
    "one clip in ten scores": lambda clips, rng: np.where(
        rng.random(clips) < 0.1, rng.uniform(2, 8, clips), rng.uniform(0, 0.02, clips)
    ),
}
# The difference of two runs on one clip; both runs are equally good.
DIFFERENCES: dict[str, Draw] = {
    "normal": lambda clips, rng: rng.normal(size=clips),
    "heavy tails (t with 4 degrees)": lambda clips, rng: rng.standard_t(4, clips),
    "skewed": lambda clips, rng: rng.exponential(size=clips) - 1 + rng.normal(scale=0.5, size=clips),
}


def quantiles(draws: Floats) -> tuple[float, float]:
    low, high = np.quantile(draws, [LEVEL / 2, 1 - LEVEL / 2])
    return float(low), float(high)


def studentised(values: Floats, means: Floats, squares: Floats) -> Floats:
    """Returns draws whose quantiles are the bootstrap-t interval of a mean, from means of values and of squares."""
    clips, mean = len(values), float(values.mean())
    error = float(values.std(ddof=1)) / np.sqrt(clips)
    errors = np.sqrt(np.maximum(squares - means**2, 0) / (clips - 1))
    return (
        mean - (means - mean) / np.maximum(errors, 1e-3 * error) * error
    )  # a resample without spread would go to infinity


def is_rejected(draws: Floats, difference: float) -> bool:
    extreme = np.abs(draws - difference) >= abs(difference)
    return bool((1 + extreme.sum()) / (1 + len(draws)) <= LEVEL)


def measure(draw: Draw, truth: float, clips: int, seed: int) -> dict[str, float]:
    """Returns the share of trials whose interval holds the truth, its mean width, and the share of rejected truths."""
    rng = np.random.default_rng([seed, clips])
    covered = dict.fromkeys(("percentile", "bca", "paired", "studentised"), 0)
    widths = dict.fromkeys(covered, 0.0)
    rejected = {"plain": 0, "paired": 0}
    for trial in range(TRIALS):
        values = draw(clips, rng)
        metric = mean_metric("score", values)
        columns = np.column_stack([metric.values, values**2])
        sums = np.concatenate([*resampled_sums([columns], RESAMPLES, trial)])
        samples = metric.score(sums[:, :2])
        single, paired = resampled(metric, samples, trial)
        draws = {
            "percentile": samples,
            "bca": single,
            "paired": paired,
            "studentised": studentised(values, samples, sums[:, 2] / clips),
        }
        for name, drawn in draws.items():
            low, high = quantiles(drawn)
            covered[name] += low <= truth <= high
            widths[name] += (high - low) / TRIALS
        rejected["plain"] += is_rejected(samples - truth, metric.corpus_score() - truth)
        rejected["paired"] += is_rejected(paired - truth, metric.corpus_score() - truth)
    return (
        {f"coverage/{name}": count / TRIALS for name, count in covered.items()}
        | {f"width/{name}": round(width, 4) for name, width in widths.items()}
        | {f"rejected/{name}": count / TRIALS for name, count in rejected.items()}
    )


def main(output: Path) -> None:
    found: dict[str, dict[str, dict[str, float]]] = {}
    for kind, draws in (("score", SCORES), ("difference", DIFFERENCES)):
        for index, (name, draw) in enumerate(draws.items()):
            truth = 0.0 if kind == "difference" else float(draw(10_000_000, np.random.default_rng(1)).mean())
            for clips in NUM_CLIPS:
                row = measure(draw, truth, clips, index)
                found.setdefault(f"{kind}: {name}", {})[str(clips)] = row
                print(
                    f"{kind:10} {name:32} {clips:4}  " + "  ".join(f"{key} {value:.3f}" for key, value in row.items()),
                    flush=True,
                )
    settings = {"trials": TRIALS, "resamples": RESAMPLES, "level": LEVEL}
    output.write_text(json.dumps({"settings": settings, "found": found}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: python benchmarks/metrics/coverage.py OUTPUT.json")
    main(Path(sys.argv[1]))
