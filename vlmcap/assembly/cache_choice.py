"""Estimates whether storing the features of a frozen encoder is faster than computing them again in every epoch.

Published measurements disagree because both cases exist. A cache saves the computation of the encoder and the decoding
of video, and costs the time to build and to read it. With a slow GPU or a large encoder it pays off from the second
epoch on. With a fast GPU, a small encoder, and a language model slow enough to hide the decoding of the data workers,
it never does.
"""

from __future__ import annotations

import math
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

# Dense half-precision peaks of the data sheets, in FLOP per second.
_PEAK_FLOPS = {"t4": 65e12, "l4": 121e12, "a100": 312e12, "a100_80": 312e12, "h100": 989e12}
_UTILISATION = 0.4  # share of the peak that towers and language models of these sizes reach
_CORE_FLOPS = 60e9  # float32 FLOP per second of one core, measured with the layers of CLIP-L on a server CPU
DISK_BYTES_PER_S = 0.5e9  # an ordinary SSD or a network disk, read clip by clip
DECODE_S = 0.5  # 8 frames of a minute of 1080p on one core; used if nothing can be measured
DISK_SHARE = 0.9  # share of the free disk space that may be filled


@dataclass(frozen=True, slots=True)
class CacheCosts:
    """Inputs of the choice; seconds and bytes are per clip unless stated otherwise.

    Attributes:
        num_clips: Clips in all splits.
        num_missing: Clips whose features are not stored yet.
        num_visits: Number of times that a clip is read in the run, in all epochs and evaluations.
        encode_s: Seconds to encode a clip.
        decode_s: Seconds to decode a clip on one core.
        rest_s: Seconds of the rest of a training step, during which workers decode and read.
        num_workers: Workers that decode in parallel to training; 0 if training waits for decoding.
        num_bytes: Bytes of the stored features.
        free_bytes: Free bytes of the disk.
        max_bytes: Largest size of all features, `cache.max_gib`; None is no limit.
        disk_bytes_per_s: Reading speed of the disk.
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
    """The faster way.

    Attributes:
        is_on: Whether to store features.
        with_s: Seconds of the run for building and reading stored features.
        without_s: Seconds of the run for encoding, and for decoding that is not hidden.
        sentence: Explanation for the user.
    """

    is_on: bool
    with_s: float
    without_s: float
    sentence: str


def choose_cache(costs: CacheCosts) -> CacheChoice:
    """Chooses whether to store features; never if they do not fit, or if reading a clip is slower than encoding it."""
    read_s, compute_s = _read_s(costs), _compute_s(costs)
    without_s = costs.num_visits * compute_s
    # Features that earlier runs have stored cost only their reading.
    with_s = costs.num_missing * _build_s(costs) + costs.num_visits * read_s
    # Only missing features need free space, but `cache.max_gib` counts those on disk too.
    needed, limit = costs.num_missing * costs.num_bytes, DISK_SHARE * costs.free_bytes
    total = costs.num_clips * costs.num_bytes
    if needed > limit:
        why = f"the features take {gigabytes(needed)}, and the disk has {gigabytes(costs.free_bytes)} free"
        return _off(with_s, without_s, why)
    if costs.max_bytes is not None and total > costs.max_bytes:
        why = f"the features take {gigabytes(total)}, and cache.max_gib allows {gigabytes(costs.max_bytes)}"
        return _off(with_s, without_s, why)
    # In this case the cache loses time in every epoch, however long the run is.
    if read_s >= compute_s:
        why = f"reading a clip takes {duration(read_s)}, and encoding it {duration(compute_s)}"
        return _off(with_s, without_s, why)
    visits = f"{grouped(costs.num_visits)} visits to {grouped(costs.num_clips)} clips"
    if with_s >= without_s:
        cost = (
            f"take about {duration(without_s)} of encoding, and {duration(with_s)} if {gigabytes(total)} of features "
            "are built and read"
        )
        return _off(with_s, without_s, f"{visits} {cost}")
    work = "built and read" if costs.num_missing else "read"
    cost = (
        f"take about {duration(with_s)} if {gigabytes(total)} of features are {work}, and {duration(without_s)} of "
        "encoding otherwise"
    )
    return CacheChoice(True, with_s, without_s, f"cache.enabled=auto: on, because {visits} {cost}")


def _off(with_s: float, without_s: float, why: str) -> CacheChoice:
    return CacheChoice(False, with_s, without_s, f"cache.enabled=auto: off, because {why}")


def _compute_s(costs: CacheCosts) -> float:
    """Returns the seconds that a clip without a cache adds to a step: encoding, and decoding that is not hidden."""
    # Without workers, decoding and encoding happen one after the other, before the step.
    if costs.num_workers == 0:
        return costs.decode_s + costs.encode_s
    step_s = costs.encode_s + costs.rest_s
    # Workers decode while the model computes. The step takes as long as the slower of the two, and `rest_s` of it
    # passes
    return max(max(costs.decode_s / costs.num_workers, step_s) - costs.rest_s, 0.0)


def _read_s(costs: CacheCosts) -> float:
    """Returns the seconds that a clip with a cache adds to a step; all workers share one disk."""
    read_s = costs.num_bytes / costs.disk_bytes_per_s
    # The rest of the step hides reading as well.
    return read_s if costs.num_workers == 0 else max(read_s - costs.rest_s, 0.0)


def _build_s(costs: CacheCosts) -> float:
    """Returns the seconds to encode and write a clip."""
    decode_s = costs.decode_s / max(1, costs.num_workers)
    # With workers, decoding and encoding overlap, and the slower one counts.
    work_s = costs.decode_s + costs.encode_s if costs.num_workers == 0 else max(decode_s, costs.encode_s)
    # The disk writes about as fast as it reads.
    return work_s + costs.num_bytes / costs.disk_bytes_per_s


def flops_per_s(hardware: str, num_cores: int | None = None) -> float:
    """Estimates the speed of a GPU or a CPU on transformers, in FLOP per second; an unknown GPU counts as an L4.

    Args:
        hardware: Name under `conf/hardware`.
        num_cores: Number of cores of a CPU; None for a GPU.
    """
    if num_cores is not None:
        return num_cores * _CORE_FLOPS
    return _UTILISATION * _PEAK_FLOPS.get(hardware, _PEAK_FLOPS["l4"])


def encoder_flops(num_parameters: int, num_tokens: int) -> float:
    """Estimates the FLOP of a forward pass: two per parameter and token, without attention, which is below a tenth."""
    # A multiplication and an addition are two FLOP.
    return 2.0 * num_parameters * num_tokens


def training_flops(num_parameters: int, num_tokens: int, *, is_checkpointed: bool) -> float:
    """Estimates the FLOP of a step through frozen weights: forward, backward to inputs, and recomputation if any."""
    # 2 forward, 2 backward to the inputs (none to frozen weights), and 2 again if the forward pass is recomputed.
    return (6.0 if is_checkpointed else 4.0) * num_parameters * num_tokens


_NUM_TIMED = 3  # clips whose decoding is timed
_PROMPT_TOKENS = 32
_CAPTION_SHARE = 0.6  # length of a mean caption, as a share of llm.max_caption_tokens


def estimate_costs(
    plan: FeaturePlan, store: FeatureStore, clips: Mapping[str, Sequence[Clip]], num_bytes: int
) -> CacheCosts:
    """Estimates the inputs of `choose_cache`.

    Args:
        plan: Feature plan of the configuration.
        store: Store of the features.
        clips: Clips of each split.
        num_bytes: Bytes of a clip's features.
    """
    import torch

    config, meta_encoder = plan.config, plan.meta_encoder
    is_cpu = config.hardware.accelerator == "cpu"
    speed = flops_per_s(config.hardware.name, torch.get_num_threads() if is_cpu else None)
    tokens = max(
        frames * rows * columns for frames, rows, columns in meta_encoder.possible_grids(config.data.num_frames)
    )
    num_parameters = sum(parameter.numel() for parameter in meta_encoder.parameters())
    # The largest split gives the most typical clips.
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
        # On a CPU, workers use the cores on which the model computes.
        num_workers=0 if is_cpu else config.data.num_workers,
        num_bytes=num_bytes,
        free_bytes=shutil.disk_usage(root).free,
        max_bytes=None if config.cache.max_gib is None else round(config.cache.max_gib * 2**30),
    )


def num_visits(config: Config, sizes: Mapping[str, int]) -> int:
    """Counts how often clips are read in a run: in all epochs, in validations, and at the end.

    A validation reads a clip once, for its captions and its loss.

    Args:
        config: Run configuration.
        sizes: Number of clips of each split; without a training split, every clip is read once.
    """
    final = sum(size for split, size in sizes.items() if split != "train")
    if "train" not in sizes:
        return final
    trained = config.tuning.num_epochs * sizes["train"]
    # -1 is Lightning's "no limit".
    if config.trainer.max_steps >= 0:
        trained = min(
            trained, config.trainer.max_steps * config.data.batch_size * config.trainer.accumulate_grad_batches
        )
    # Epochs that a limit of steps leaves out are not validated.
    num_epochs = math.ceil(trained / sizes["train"])
    num_validations = num_epochs // config.evaluation.every_n_epochs
    validated = num_validations * min(config.evaluation.max_clips, sizes.get("val", 0))
    return trained + validated + final


def time_decoding(dataset: ClipDataset) -> float:
    """Measures the seconds to read and resize a clip: the median of a few, or `DECODE_S` if none can be read."""
    from vlmcap.types import Sample

    count = len(dataset)
    taken: list[float] = []
    # Evenly spread positions; a data set of fewer clips gives fewer.
    for index in sorted({count * step // _NUM_TIMED for step in range(_NUM_TIMED)} - {count}):
        for _ in range(1 if taken else 2):  # the first read also starts the decoder
            started = time.perf_counter()
            sample = dataset[index]
            seconds = time.perf_counter() - started
        if isinstance(sample, Sample):
            taken.append(seconds)
    return sorted(taken)[len(taken) // 2] if taken else DECODE_S


def existing_parent(folder: Path) -> Path:
    """Returns the folder, or its nearest parent that exists."""
    return next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())


def _language_flops(plan: FeaturePlan) -> float:
    """Estimates the FLOP of the language model in a training step for one clip, from its configuration alone."""
    config = plan.config
    folder = plan.base_checkpoints.folders.get("model") or plan.base_checkpoints.folders.get("llm")
    if folder is None:  # features are prepared for another machine
        return 0.0
    from vlmcap.models.llm.load import num_active_parameters

    tokens = plan.num_visual_tokens + _PROMPT_TOKENS + round(_CAPTION_SHARE * config.llm.caption_tokens)
    return training_flops(num_active_parameters(folder), tokens, is_checkpointed=config.hardware.gradient_checkpointing)
