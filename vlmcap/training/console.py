"""What a training run prints at its start and at its end."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vlmcap.config import Config
from vlmcap.training.strategy import describe_batch
from vlmcap.training.summary import tokenizer_version

if TYPE_CHECKING:
    from vlmcap.assembly.model import Assembly
    from vlmcap.training.objects import Run


def show_start(config: Config, run: Run, assembly: Assembly) -> dict[str, dict[str, int]]:
    """Prints what is trained of what, and returns the counts."""
    from vlmcap.training.callbacks.progress import part_counts, show_parts

    parts = part_counts(assembly.captioner, run.module.trained, assembly.num_encoder_parameters)
    notes = {
        "clips": " / ".join(f"{len(clips)} {split}" for split, clips in run.data.clips.items()),
        "batch": describe_batch(config),
        "precision": config.hardware.precision.value,
    }
    if config.projector.checkpoint:
        notes["projector from"] = config.projector.checkpoint
    title = f"{' + '.join(config.part_names.values())}, {config.tuning.name}, on {config.hardware.name}"
    show_parts(parts, num_visual_tokens=assembly.num_visual_tokens, title=title, notes=notes)
    return parts


def show_end(config: Config, run: Run, scores: dict[str, float], seconds: dict[str, float]) -> None:
    """Prints the scores, an example, what was left out, and where the run is."""
    from vlmcap.training.callbacks.progress import show_scores

    show_scores(scores, tokenizer_version(config))
    if run.evaluation.predictions:
        example = run.evaluation.predictions[0]
        print(f"{example.clip.video}\n  prediction  {example.text}\n  reference   {example.clip.captions[0]}")
    if run.module.num_truncated:
        print(f"{run.module.num_truncated} captions were cut to llm.max_caption_tokens.")
    if len(run.module.ledger):
        print(f"{len(run.module.ledger)} clips were skipped; {run.module.ledger.path} names them.")
    print(f"Done in {seconds['total'] / 60:.1f} min ({seconds['fit'] / 60:.1f} min of training): {run.folder}")
