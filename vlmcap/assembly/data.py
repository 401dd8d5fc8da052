"""Builds the data module of a configuration."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vlmcap.config import Batching, Config, Strategy

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch.utils.data import Dataset

    from vlmcap.assembly.model import Assembly
    from vlmcap.data.loading.datamodule import CaptionDataModule
    from vlmcap.types import Clip, FrameTimes, GridTHW, Sample, Skipped


def build_data(config: Config, assembly: Assembly, clips: Mapping[str, Sequence[Clip]]) -> CaptionDataModule:
    """Builds the loaders of all splits, which read stored features if the assembly has them.

    Args:
        config: Run configuration.
        assembly: Assembled model.
        clips: Clips of each split, as `load_splits` returns them.
    """
    from vlmcap.data.loading.collate import Collator
    from vlmcap.data.loading.datamodule import CaptionDataModule

    collator = Collator(assembly.captioner.prompt, assembly.visual, config.llm.caption_tokens)
    features = assembly.features

    def make_dataset(chosen: Sequence[Clip]) -> Dataset[Sample | Skipped]:
        if features is not None:
            return features.dataset(chosen)
        return assembly.feature_plan.decoded(chosen)

    data = config.data
    if features is not None and config.encoder.is_cached:
        # Small features are read faster than a worker sends them, unlike those of real encoders (tens of MB per clip).
        data = dataclasses.replace(data, num_workers=0)
    is_shuffled = data.batching is Batching.shuffled
    return CaptionDataModule(
        clips,
        make_dataset,
        collator,
        dataclasses.replace(collator, mode="generate"),
        data,
        prompt_batch_size=assembly.captioner.prompt_batch_size,
        seed=config.seed,
        max_eval_clips=config.evaluation.max_clips,
        lengths=None if is_shuffled or "train" not in clips else training_lengths(config, assembly, clips["train"]),
        pin_memory=config.hardware.accelerator != "cpu",
        # With FSDP, every rank takes part in every forward pass, so all ranks must caption the same clips.
        is_evaluation_shared=config.trainer.strategy is not Strategy.fsdp2,
    )


def training_lengths(config: Config, assembly: Assembly, clips: Sequence[Clip]) -> NDArray[np.int64]:
    """Returns the tokens of each clip's full sequence, (N,); unknown video sizes count as the largest possible."""
    from vlmcap.data.loading.lengths import caption_lengths, sequence_lengths

    prompt = assembly.captioner.prompt
    base = assembly.base_checkpoints.fingerprints["model" if config.is_pretrained_vlm else "llm"]
    folder = Path(config.paths.cache_dir) / "manifests"
    captions = caption_lengths(
        clips, prompt.encode_caption, folder=folder, fingerprint=f"{base.sha256}:{prompt.caption_lead}"
    )
    limit = config.llm.caption_tokens
    return sequence_lengths(
        captions,
        max_caption_tokens=limit,
        prompt_tokens=prompt.num_prompt_tokens,
        visual_tokens=_visual_lengths(config, assembly, clips),
    )


def _visual_lengths(config: Config, assembly: Assembly, clips: Sequence[Clip]) -> int | NDArray[np.int64]:
    """Returns the visual tokens and the text between them: (N,) if features give each clip's size, else the largest."""
    import numpy as np

    from vlmcap.assembly.model import latest_times

    def length(grid: GridTHW | None, times_s: FrameTimes | None) -> int:
        return sum(part if isinstance(part, int) else len(part) for part in assembly.visual(grid, times_s))

    if assembly.features is None:
        encoder = assembly.captioner.encoder
        assert encoder is not None
        latest = latest_times(config.data.num_frames)
        return max(length(grid, latest) for grid in encoder.possible_grids(config.data.num_frames))
    return np.array([length(grid, times_s) for grid, times_s in assembly.features.layouts(clips)], np.int64)
