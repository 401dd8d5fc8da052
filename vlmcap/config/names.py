"""What runs are told apart by, and the names of what they log.

Loggers write these, and panels and reports read them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlmcap.config.run import Config

# Curves, by optimiser step.
STEP = "trainer/global_step"
TRAIN_LOSS, VAL_LOSS, TOKENS_PER_S = "train/loss", "val/loss", "train/tokens_per_s"
RATES = ("train/lr_projector", "train/lr_adapter")
SCORES = ("val/cider", "val/bleu_4", "val/rouge_l")
COLLAPSE = ("val/distinct_ratio", "val/length_ratio", "val/repetition_rate", "val/is_collapsed")
# Of a whole run, at its end; beside them stand the final scores of each split.
FINAL_SCORES = ("val/cider", "val/bleu_4", "val/rouge_l", "val/meteor", "val/chrf")
PEAK_MEMORY, SECONDS, FIT_SECONDS = "peak_memory_gib", "seconds/total", "seconds/fit"
PARAMETERS, TRAINED_PARAMETERS = "parameters/total", "parameters/trained"
# Tables of clips.
VAL_TABLE, TEST_TABLE = "val/captions", "test/captions"


def factors(config: Config) -> dict[str, Any]:
    """What runs are compared by, under one word each; the words of groups are those that a command line takes."""
    return {
        "model": config.model.name,
        **{part: getattr(config, part).name for part in ("encoder", "projector", "llm", "tuning", "hardware")},
        "data": config.data.name,
        "seed": config.seed,
        "num_frames": config.data.num_frames,
        "batch_size": config.data.batch_size * config.trainer.accumulate_grad_batches,
        "lora_rank": config.tuning.lora_rank,
        "quantization": config.llm.quantization.name,
    }


def flat_summary(summary: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a run's `summary.json` by name; what has no value is left out."""
    flat = {name: value for name, value in summary["scores"].items() if value is not None}
    flat |= {f"seconds/{name}": value for name, value in summary["seconds"].items()}
    parts = summary["parameters"]
    flat |= {f"parameters/{part}": counts["parameters"] for part, counts in parts.items()}
    flat[PARAMETERS] = sum(counts["parameters"] for counts in parts.values())
    flat[TRAINED_PARAMETERS] = sum(counts["trained"] for counts in parts.values())
    counts = {name: summary[name] for name in (PEAK_MEMORY, "steps", "truncated_captions", "skipped_clips")}
    return flat | {name: value for name, value in counts.items() if value is not None}
