"""The settings by which runs are compared, and the names of logged metrics, which loggers write and reports read."""

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
# Values of a finished run, in addition to the final scores of each split.
FINAL_SCORES = ("val/cider", "val/bleu_4", "val/rouge_l", "val/meteor", "val/chrf")
PEAK_MEMORY, SECONDS, FIT_SECONDS = "peak_memory_gib", "seconds/total", "seconds/fit"
PARAMETERS, TRAINED_PARAMETERS = "parameters/total", "parameters/trained"
# Tables of clips.
VAL_TABLE, TEST_TABLE = "val/captions", "test/captions"


def factors(config: Config) -> dict[str, Any]:
    """Returns the settings by which runs are compared, under one word each; groups have their command line names."""
    return {
        "model": config.model.name,
        **{group: getattr(config, group).name for group in ("encoder", "projector", "llm", "tuning", "hardware")},
        "data": config.data.name,
        "seed": config.seed,
        "num_frames": config.data.num_frames,
        "batch_size": config.data.batch_size * config.trainer.accumulate_grad_batches,
        "lora_rank": config.tuning.lora_rank,
        "quantization": config.llm.quantization.name,
    }


def flat_summary(summary: Mapping[str, Any]) -> dict[str, float]:
    """Returns the numbers of `summary.json` by name, without those that have no value."""
    flat = {name: value for name, value in summary["scores"].items() if value is not None}
    flat |= {f"seconds/{name}": value for name, value in summary["seconds"].items()}
    components = summary["parameters"]
    flat |= {f"parameters/{component}": counts["parameters"] for component, counts in components.items()}
    flat[PARAMETERS] = sum(counts["parameters"] for counts in components.values())
    flat[TRAINED_PARAMETERS] = sum(counts["trained"] for counts in components.values())
    counts = {name: summary[name] for name in (PEAK_MEMORY, "steps", "truncated_captions", "skipped_clips")}
    return flat | {name: value for name, value in counts.items() if value is not None}
