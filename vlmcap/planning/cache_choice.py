"""Whether keeping a frozen encoder's features on disk is cheaper than computing them anew in every epoch.

Published measurements conflict, and both sides are right. A cache saves the encoder's arithmetic and the decoding of video, and costs
the building and the reading: with a slow card or a large encoder it pays from the second epoch on, with a fast card, a small encoder and
a language model behind which the data workers hide their decoding it never does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

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
    """The cheaper of a cache and none; none where it does not fit, or where reading a clip takes longer than encoding it."""
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
    """Seconds that a clip without a cache adds to a step: its encoding, and as much of the decoding as the workers cannot hide."""
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
    """Speed of a card, or of so many cores, at the matrices of transformers; a card without an entry counts as an L4.

    Args:
        hardware: Name under `conf/hardware`.
        num_cores: Of a CPU; None for a card.
    """
    if num_cores is not None:
        return num_cores * _CORE_FLOPS
    return _UTILISATION * _PEAK_FLOPS.get(hardware, _PEAK_FLOPS["l4"])


def encoder_flops(num_parameters: int, num_tokens: int) -> float:
    """Arithmetic of a forward pass: two operations a parameter and token; attention's own part, below a tenth here, is left out."""
    return 2.0 * num_parameters * num_tokens


def training_flops(num_parameters: int, num_tokens: int, *, is_checkpointed: bool) -> float:
    """Arithmetic of a step through frozen weights: forward, backward to the inputs, and forward again under gradient checkpointing."""
    return (6.0 if is_checkpointed else 4.0) * num_parameters * num_tokens


def gigabytes(num_bytes: float) -> str:
    """`31.2 GB`, or `8.5 MB` or `0.7 kB` where it is less."""
    unit, size = next(((unit, size) for unit, size in (("GB", 1e9), ("MB", 1e6)) if num_bytes >= size), ("kB", 1e3))
    return f"{num_bytes / size:.1f} {unit}"


def grouped(count: int) -> str:
    """`2 300`."""
    return f"{count:,}".replace(",", " ")


def duration(seconds: float) -> str:
    """`1.4 h`, `3.0 min`, `12 s` or `0.8 ms`."""
    if seconds >= 5400:
        return f"{seconds / 3600:.1f} h"
    if seconds >= 90:
        return f"{seconds / 60:.1f} min"
    return f"{seconds:.3g} s" if seconds >= 1 or math.isclose(seconds, 0) else f"{seconds * 1000:.3g} ms"
