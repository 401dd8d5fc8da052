"""What `cache.enabled=auto` weighs, taken from a configuration, its bases and a few of its clips."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vlmcap.config import Config
from vlmcap.planning.cache_choice import DECODE_S, CacheCosts, encoder_flops, flops_per_s, training_flops

if TYPE_CHECKING:
    from vlmcap.build.features import FeaturePlan
    from vlmcap.data.features.store import FeatureStore
    from vlmcap.data.loading.dataset import ClipDataset
    from vlmcap.types import Clip

_NUM_TIMED = 3  # clips whose decoding is timed
_PROMPT_TOKENS = 32
_CAPTION_SHARE = 0.6  # of llm.max_caption_tokens, which leaves room above the longest


def estimate_costs(plan: FeaturePlan, store: FeatureStore, clips: Mapping[str, Sequence[Clip]], num_bytes: int) -> CacheCosts:
    """Seconds and bytes of a clip, and how often clips are taken.

    Args:
        plan: Of the configuration.
        store: That the features would be in.
        clips: Split name to clips.
        num_bytes: Of a clip's features.
    """
    import torch

    config, sketch = plan.config, plan.sketch
    is_cpu = config.hardware.accelerator == "cpu"
    speed = flops_per_s(config.hardware.name, torch.get_num_threads() if is_cpu else None)
    tokens = max(frames * rows * columns for frames, rows, columns in sketch.possible_grids(config.data.num_frames))
    num_parameters = sum(parameter.numel() for parameter in sketch.parameters())
    longest = max(clips.values(), key=len)
    num_clips = sum(len(members) for members in clips.values())
    root = existing_parent(store.folder)
    return CacheCosts(
        num_clips=num_clips,
        num_missing=max(0, num_clips - len(store)),
        num_visits=num_visits(config, {split: len(members) for split, members in clips.items()}),
        encode_s=encoder_flops(num_parameters, tokens) / speed,
        decode_s=time_decoding(plan.decoded(longest)),
        rest_s=_language_flops(plan) / speed,
        num_workers=0 if is_cpu else config.data.num_workers,  # on a CPU the workers take the cores that the model computes on
        num_bytes=num_bytes,
        free_bytes=shutil.disk_usage(root).free,
        max_bytes=None if config.cache.max_gib is None else round(config.cache.max_gib * 2**30),
    )


def num_visits(config: Config, sizes: Mapping[str, int]) -> int:
    """Clips taken in a run: every epoch of every stage, the evaluations in the loop (captions and loss), whole splits at the end.

    Args:
        config: Of the run.
        sizes: Split name to its number of clips; without a training split it is one pass over all.
    """
    final = sum(size for split, size in sizes.items() if split != "train")
    if "train" not in sizes:
        return final
    num_epochs = sum(stage.epochs for stage in config.tuning.stages.values())
    trained = num_epochs * sizes["train"]
    if config.trainer.max_steps >= 0:
        trained = min(trained, config.trainer.max_steps * config.data.batch_size * config.trainer.accumulate_grad_batches)
    evaluated = 2 * min(config.evaluation.max_clips, sizes.get("val", 0)) * (num_epochs // config.evaluation.every_n_epochs)
    return trained + evaluated + final


def time_decoding(dataset: ClipDataset) -> float:
    """Seconds that a clip takes to be read and resized, the median of a few; a stated constant where none can be read."""
    from vlmcap.types import Sample

    count = len(dataset)
    taken: list[float] = []
    for index in sorted({count * part // _NUM_TIMED for part in range(_NUM_TIMED)} - {count}):
        for _ in range(1 if taken else 2):  # the first also starts what decodes
            started = time.perf_counter()
            sample = dataset[index]
            seconds = time.perf_counter() - started
        if isinstance(sample, Sample):
            taken.append(seconds)
    return sorted(taken)[len(taken) // 2] if taken else DECODE_S


def existing_parent(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    return next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())


def _language_flops(plan: FeaturePlan) -> float:
    """Arithmetic of a training step's language model for one clip, from its configuration alone."""
    config = plan.config
    folder = plan.sources.folders.get("model") or plan.sources.folders.get("llm")
    if folder is None:  # features are prepared for another machine
        return 0.0
    from vlmcap.models.llm.load import num_active_parameters

    tokens = plan.num_visual_tokens + _PROMPT_TOKENS + round(_CAPTION_SHARE * config.llm.max_caption_tokens)
    return training_flops(num_active_parameters(folder), tokens, is_checkpointed=config.hardware.gradient_checkpointing)
