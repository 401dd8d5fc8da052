"""Peak memory of the host during a run: the process, the data that passes through it, and data workers with batches."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vlmcap.config import Config, Strategy
from vlmcap.planning.hardware import GIB
from vlmcap.planning.peak_memory import FLOAT, OPTIMIZERS, Moment, ProfiledStage, largest_first

_MIB = 2**20
# Measured with the CPU builds of torch 2.13, transformers 5.23, peft and lightning: private memory of a process after
# all imports of a run, and of a data worker and its decoding process after a few clips. What a CUDA build adds was not
# measured.
PROCESS_BYTES = 550 * _MIB
WORKER_BYTES, DECODER_BYTES = 60 * _MIB, 120 * _MIB
_DECODED_BYTES = 2 * 1920 * 1080 * 3  # a 1080p frame, once decoded and once while it is resized
_PREFETCHED = 2  # training batches per worker that wait, PyTorch's default; of other loaders one waits


@dataclass(frozen=True, slots=True)
class HostBatch:
    """A batch as data workers hand it over.

    Attributes:
        loader: Name of its loader.
        num_bytes: Bytes of its frames or features.
    """

    loader: str
    num_bytes: float


def host_peak(
    config: Config,
    stages: Sequence[ProfiledStage],
    batches: Sequence[HostBatch],
    offloaded: float,
    waiting: float,
    scores: Mapping[str, ProfiledStage],
) -> Moment:
    """Returns the moment at which the host's memory is fullest.

    Args:
        config: Run configuration.
        stages: Stages of a training step.
        batches: Batches of the loaders whose workers are alive together: training first, then validation.
        offloaded: Bytes of checkpointed block inputs that are offloaded to host memory.
        waiting: Bytes of features that wait for their captions to be decoded.
        scores: Score name to the stage of its model.
    """
    # 1. What is alive at every moment.
    num_trained = sum(stage.memory.num_trained for stage in stages)
    process = {"process": float(PROCESS_BYTES)}
    loaders = _loaders(config, batches)
    # An encoder of its own is read to the host before it moves to the GPU; a pretrained VLM is not.
    tower = next(
        (
            sum(stage.memory.weights.values())
            for stage in stages
            if stage.name == "encoder" and not config.is_pretrained_vlm
        ),
        0.0,
    )
    # 2. The moments of training; weights pass through the host while they are loaded.
    moments = {
        "loading": process | {"encoder being moved to the device": tower},
        "training": process | loaders | {"offloaded checkpoints": offloaded},
        "validating": process | loaders | {"features to caption": waiting},
    }
    # 3. The moments after `fit`, at whose end Lightning moves the optimiser state to the host.
    ended = process | {name: size for name, size in loaders.items() if name.startswith("pinned")}
    ended |= {"optimiser state": OPTIMIZERS[config.optim.kind.value][0] * num_trained}
    if config.trainer.shrink_on_oom:
        moments["training"]["copies of trained weights"] = FLOAT * num_trained
    for name, stage in scores.items():
        moments[f"scoring by {name}"] = ended | {
            f"{name} being moved to the device": sum(stage.memory.weights.values())
        }
    # Only the loader of captions runs then.
    moments["captioning a whole split"] = ended | _loaders(config, batches[1:]) | {"features to caption": waiting}
    name, sizes = max(moments.items(), key=lambda item: sum(item[1].values()))
    return Moment(name, largest_first(sizes))


def _loaders(config: Config, batches: Sequence[HostBatch]) -> dict[str, float]:
    """Returns the bytes of workers, which stay alive between epochs, their decoding processes and waiting batches."""
    is_on_gpu, workers = config.hardware.accelerator != "cpu", config.data.num_workers
    if config.cache.enabled is True and config.encoder.is_cached:
        workers = 0  # small features are read without workers
    decodes = config.cache.enabled is not True
    decoder = DECODER_BYTES + config.data.num_frames * _DECODED_BYTES if decodes and config.data.is_isolated else 0.0
    sizes = {
        "data workers": float(len(batches) * workers * WORKER_BYTES),
        "decoding": float(len(batches) * max(workers, 1) * decoder),
    }
    for batch in batches:
        waiting = max(1, (_PREFETCHED if batch.loader == "training" else 1) * workers)
        if is_on_gpu:  # page-locked copies replace what the workers sent, and are reused by later batches
            sizes[f"pinned batches, {batch.loader}"] = waiting * pinned_bytes(batch.num_bytes)
        sizes[f"batches, {batch.loader}"] = (1 if is_on_gpu else waiting) * batch.num_bytes
    return sizes


def pinned_bytes(num_bytes: float) -> float:
    """Returns the bytes that PyTorch page-locks for an allocation: powers of two (ATen/core/CachingHostAllocator.h)."""
    return float(2 ** math.ceil(math.log2(num_bytes))) if num_bytes > 0 else 0.0


def host_sentence(config: Config, host: Moment, machine_gib: float) -> str:
    """Returns what is wrong if the host has too little memory; empty if it fits, or if its size is unknown."""
    # Each process of several GPUs has memory of its own.
    needed = host.total / GIB * (1 if config.trainer.strategy is Strategy.auto else config.hardware.devices)
    if not machine_gib or needed <= machine_gib:
        return ""
    # `sizes` is sorted, and the process itself cannot be made smaller.
    largest, size = next((name, size) for name, size in host.sizes.items() if name != "process")
    return (
        f"the host needs {needed:.1f} GiB of memory while {host.name}, {size / GIB:.1f} of it for {largest}, and this "
        f"machine has {machine_gib:.1f}; lower data.num_workers or evaluation.clips_per_slot"
    )
