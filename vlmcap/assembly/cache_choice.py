"""Whether keeping a frozen encoder's features on disk is cheaper than computing them anew in every epoch.

Published measurements conflict, and both sides are right. A cache saves the encoder's arithmetic and the decoding of
video, and costs the building and the reading: with a slow GPU or a large encoder it pays from the second epoch on, with
a fast GPU, a small encoder and a language model behind which the data workers hide their decoding it never does.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vlmcap.config import Config
from vlmcap.terminal import duration, gigabytes, grouped

if TYPE_CHECKING:
    from vlmcap.assembly.datasets import FeaturePlan
    from vlmcap.data.features.store import FeatureStore
    from vlmcap.data.loading.clip_dataset import ClipDataset
    from vlmcap.types import Clip

# Dense half-precision peaks of the data sheets, in FLOP a second.
_PEAK_FLOPS = {"t4": 65e12, "l4": 121e12, "a100": 312e12, "a100_80": 312e12, "h100": 989e12}
_UTILISATION = 0.4  # of the peak, that towers and language models of these sizes reach
_CORE_FLOPS = 60e9  # float32 on one core: measured with CLIP-L's layers on a server CPU
DISK_BYTES_PER_S = 0.5e9  # of an ordinary SSD or a network disk, read clip by clip
DECODE_S = 0.5  # of 8 frames of a minute of 1080p on one core, where nothing could be measured
DISK_SHARE = 0.9  # of the free space, that may be filled


@dataclass(frozen=True, slots=True)
class CacheCosts:
    """What the choice depends on; of one clip where nothing else is said.

    Attributes:
        num_clips: In all splits.
        num_missing: Of them, not on disk yet.
        num_visits: Clips taken in the whole run, every epoch and evaluation counted.
        encode_s: Seconds of the encoder.
        decode_s: Seconds of decoding on one core.
        rest_s: Seconds of what a training step does besides, behind which the workers decode and read.
        num_workers: That decode beside the training; 0 where the training itself waits for it.
        num_bytes: Of the features as they are stored.
        free_bytes: On the disk.
        max_bytes: That may be taken, `cache.max_gib`; None is no limit.
        disk_bytes_per_s: Speed of reading.
    """

    num_clips: int
    num_missing: int
    num_visits: int
    encode_s: float
    decode_s: float
    rest_s: float
    num_workers: int
    num_bytes: int
    free_bytes: int
    max_bytes: int | None = None
    disk_bytes_per_s: float = DISK_BYTES_PER_S


@dataclass(frozen=True, slots=True)
class CacheChoice:
    """The cheaper way.

    Attributes:
        is_on: Whether features are kept.
        with_s: Seconds that building and reading cost in the whole run.
        without_s: Seconds that encoding, and decoding that nothing hides, cost in the whole run.
        sentence: Why, for people.
    """

    is_on: bool
    with_s: float
    without_s: float
    sentence: str


def choose_cache(costs: CacheCosts) -> CacheChoice:
    """The cheaper of a cache and none.

    None where it does not fit, or where reading a clip takes longer than encoding it.
    """
    read_s, compute_s = _read_s(costs), _compute_s(costs)
    without_s = costs.num_visits * compute_s
    with_s = costs.num_missing * _build_s(costs) + costs.num_visits * read_s
    needed, limit = costs.num_missing * costs.num_bytes, DISK_SHARE * costs.free_bytes
    whole = costs.num_clips * costs.num_bytes
    if needed > limit:
        why = f"the features take {gigabytes(needed)}, and the disk has {gigabytes(costs.free_bytes)} free"
        return _off(with_s, without_s, why)
    if costs.max_bytes is not None and whole > costs.max_bytes:
        why = f"the features take {gigabytes(whole)}, and cache.max_gib allows {gigabytes(costs.max_bytes)}"
        return _off(with_s, without_s, why)
    if read_s >= compute_s:
        why = f"reading a clip takes {duration(read_s)}, and encoding it {duration(compute_s)}"
        return _off(with_s, without_s, why)
    visits = f"{grouped(costs.num_visits)} visits to {grouped(costs.num_clips)} clips"
    if with_s >= without_s:
        cost = f"cost about {duration(without_s)} of encoding, and {duration(with_s)} with features of {gigabytes(whole)} built and read"
        return _off(with_s, without_s, f"{visits} {cost}")
    work = "built and read" if costs.num_missing else "read"
    cost = f"cost about {duration(with_s)} with features of {gigabytes(whole)} {work}, and {duration(without_s)} of encoding without"
    return CacheChoice(True, with_s, without_s, f"cache.enabled=auto: on, as {visits} {cost}")


def _off(with_s: float, without_s: float, why: str) -> CacheChoice:
    return CacheChoice(False, with_s, without_s, f"cache.enabled=auto: off, as {why}")


def _compute_s(costs: CacheCosts) -> float:
    """Seconds that a clip without a cache adds to a step.

    Its encoding, and as much of the decoding as the workers cannot hide.
    """
    if costs.num_workers == 0:
        return costs.decode_s + costs.encode_s
    step_s = costs.encode_s + costs.rest_s
    return max(max(costs.decode_s / costs.num_workers, step_s) - costs.rest_s, 0.0)


def _read_s(costs: CacheCosts) -> float:
    """Seconds that a clip with a cache adds to a step; the disk is one, however many workers read."""
    read_s = costs.num_bytes / costs.disk_bytes_per_s
    return read_s if costs.num_workers == 0 else max(read_s - costs.rest_s, 0.0)


def _build_s(costs: CacheCosts) -> float:
    """Seconds that a clip takes to be encoded and written."""
    decode_s = costs.decode_s / max(1, costs.num_workers)
    work_s = costs.decode_s + costs.encode_s if costs.num_workers == 0 else max(decode_s, costs.encode_s)
    return work_s + costs.num_bytes / costs.disk_bytes_per_s


def flops_per_s(hardware: str, num_cores: int | None = None) -> float:
    """Speed of a GPU, or of so many cores, at the matrices of transformers; a GPU without an entry counts as an L4.

    Args:
        hardware: Name under `conf/hardware`.
        num_cores: Of a CPU; None for a GPU.
    """
    if num_cores is not None:
        return num_cores * _CORE_FLOPS
    return _UTILISATION * _PEAK_FLOPS.get(hardware, _PEAK_FLOPS["l4"])


def encoder_flops(num_parameters: int, num_tokens: int) -> float:
    """Arithmetic of a forward pass: two operations a parameter and token.

    Attention's own part, below a tenth here, is left out.
    """
    return 2.0 * num_parameters * num_tokens


def training_flops(num_parameters: int, num_tokens: int, *, is_checkpointed: bool) -> float:
    """Arithmetic of a step through frozen weights.

    Forward, backward to the inputs, and forward again under gradient checkpointing.
    """
    return (6.0 if is_checkpointed else 4.0) * num_parameters * num_tokens


_NUM_TIMED = 3  # clips whose decoding is timed
_PROMPT_TOKENS = 32
_CAPTION_SHARE = 0.6  # of llm.max_caption_tokens, which leaves room above the longest


def estimate_costs(
    plan: FeaturePlan, store: FeatureStore, clips: Mapping[str, Sequence[Clip]], num_bytes: int
) -> CacheCosts:
    """Seconds and bytes of a clip, and how often clips are taken.

    Args:
        plan: Of the configuration.
        store: That the features would be in.
        clips: Split name to clips.
        num_bytes: Of a clip's features.
    """
    import torch

    config, meta_encoder = plan.config, plan.meta_encoder
    is_cpu = config.hardware.accelerator == "cpu"
    speed = flops_per_s(config.hardware.name, torch.get_num_threads() if is_cpu else None)
    tokens = max(
        frames * rows * columns for frames, rows, columns in meta_encoder.possible_grids(config.data.num_frames)
    )
    num_parameters = sum(parameter.numel() for parameter in meta_encoder.parameters())
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
        num_workers=0
        if is_cpu
        else config.data.num_workers,  # on a CPU the workers take the cores that the model computes on
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
    num_epochs = config.tuning.num_epochs
    trained = num_epochs * sizes["train"]
    if config.trainer.max_steps >= 0:
        trained = min(
            trained, config.trainer.max_steps * config.data.batch_size * config.trainer.accumulate_grad_batches
        )
    evaluated = (
        2 * min(config.evaluation.max_clips, sizes.get("val", 0)) * (num_epochs // config.evaluation.every_n_epochs)
    )
    return trained + evaluated + final


def time_decoding(dataset: ClipDataset) -> float:
    """Seconds that a clip takes to be read and resized, the median of a few.

    A stated constant where none can be read.
    """
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

    tokens = plan.num_visual_tokens + _PROMPT_TOKENS + round(_CAPTION_SHARE * config.llm.caption_tokens)
    return training_flops(num_active_parameters(folder), tokens, is_checkpointed=config.hardware.gradient_checkpointing)
