"""Measures training and captions at true size with random weights, beside their plan."""

from __future__ import annotations

import dataclasses
import math
import random
import time
from contextlib import ExitStack
from typing import Any
from unittest import mock

import lightning as L
import torch

from benchmarks.gpu import limits
from benchmarks.gpu.counting import Waits, launches, wait, watching_host
from benchmarks.gpu.models import (
    NUM_NEW,
    Prepared,
    peak_flops,
    prepare,
    tiny_moe,
    training,
    training_batch,
    writer,
)
from benchmarks.gpu.registry import Place
from benchmarks.gpu.rows import Report
from vlmcap.measuring.memory_use import MemoryMeter, PeakMemory
from vlmcap.measuring.steps import batch_loader
from vlmcap.models.decoding.engine import native_engine_obstacle
from vlmcap.models.llm.adapt import base_model
from vlmcap.models.llm.attention import REPEATED
from vlmcap.models.versions import check_transformers
from vlmcap.planning.estimate.meta_models import text_config
from vlmcap.planning.hardware import GIB, planned_device
from vlmcap.planning.make_plan import make_plan
from vlmcap.planning.peak_memory import Moment

# Micro-batches, of which one takes a slow GPU seconds: the first allocates memory and chooses kernels.
WARM, COUNTED, TIMED = 1, 2, 2
PROFILED = 3  # tokens of a profile, which takes a while to read
ACCUMULATED = 2  # micro-batches to an optimiser step
# Seconds per caption of recommended_h100 as planned when the goal was set: 46 ms per token of 16 slots, 0.6 × 768
# tokens, and the prompts.
_PLANNED_CAPTIONS_S = 1.495
_CAPTION_SHARE = 0.6  # of the most tokens: the mean caption of the Korean data


def recommended_l4(report: Report, place: Place) -> None:
    """Measures SigLIP 2, MLP and Qwen3-8B in 4 bits."""
    measure(report, place, prepare(place, "recommended_l4"), is_bounded=True)


def recommended_h100(report: Report, place: Place) -> None:
    """Measures DINOv3-H+, cross-attention and Qwen3-32B in 4 bits, and captions per second against the earlier plan."""
    prepared = prepare(place, "recommended_h100")
    seconds = measure(report, place, prepared, is_bounded=True).seconds
    num_slots, most = prepared.plan.eval_batch_size, prepared.whole.llm.new_tokens
    caption_s = (seconds["prompt"] + _CAPTION_SHARE * most * seconds["token"]) / num_slots
    report.add(f"captions, {num_slots} slots", "seconds per caption of 0.6 × its most tokens", caption_s)
    ratio = _PLANNED_CAPTIONS_S / caption_s
    limit = limits.CAPTIONS if (peak_flops() or 0) >= 900e12 else None
    report.add(f"captions, {num_slots} slots", "captions per second over the earlier plan's", ratio, limit)


def moe(report: Report, place: Place) -> None:
    """Measures four layers of Qwen3-30B-A3B."""
    check_transformers("quantised experts")
    tiny = [f"llm.checkpoint={tiny_moe(place.folder / 'moe')}", "llm.quantization=4bit"]
    prepared = prepare(place, "moe", tiny)
    watch = measure(report, place, prepared, is_bounded=False)
    depth = int(text_config(prepared.config).num_hidden_layers)
    report.add(
        f"captions, {watch.num_slots} slots", "launches per token and layer", watch.per_token.count / PROFILED / depth
    )


def t4(report: Report, place: Place) -> None:
    """Measures what a T4 would run: attention with repeated keys, and fp16 with loss scaling.

    Four layers are enough, as all layers take the same path. A rehearsal uses bf16, as CPUs have no fp16 layer norm.
    """
    with ExitStack() as stack:
        if place.device == "cuda":  # attention is chosen by the compute capability
            stack.enter_context(mock.patch.object(torch.cuda, "get_device_capability", lambda *_: (7, 5)))
        tiny = ["hardware.precision=bf16", f"llm.attention={REPEATED}"]
        prepared = prepare(place, "t4", tiny)
        model: Any = base_model(prepared.captioner.llm)
        report.add("attention", "is sdpa_repeated", model.config._attn_implementation == REPEATED, limits.ALL)
        report.add("our engine", "decodes it", not native_engine_obstacle(prepared.captioner.llm), limits.ALL)
        before = [parameter.detach().clone() for parameter in prepared.captioner.projector.parameters()]
        if place.device == "cuda":
            # Leave out FlashAttention, which a T4 does not have, and plain products, which would hold S × S numbers.
            from torch.nn.attention import SDPBackend, sdpa_kernel

            stack.enter_context(sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION))
        measure(report, place, prepared, is_bounded=False)
        changed = [
            not torch.equal(old, new)
            for old, new in zip(before, prepared.captioner.projector.parameters(), strict=True)
        ]
        report.add(
            "loss scaling", "weights of the projector that steps have changed", sum(changed) / len(changed), limits.ALL
        )


def measure(report: Report, place: Place, prepared: Prepared, *, is_bounded: bool) -> Watch:
    """Measures memory, time, waits and host memory of a few optimiser steps in Lightning, and of captions.

    Args:
        report: Receives the figures.
        place: Where it runs.
        prepared: Configuration and model.
        is_bounded: Whether utilisation and waits have bounds.
    """
    rng = random.Random(prepared.config.seed)
    longest = [index < WARM or index >= WARM + COUNTED for index in range(WARM + COUNTED + TIMED)]
    batches = [training_batch(prepared, rng, is_longest=is_longest) for is_longest in longest]
    use = MemoryMeter(place.device)
    watch = Watch(place, use, prepared, prepared.plan.eval_batch_size)
    with watching_host() as host:
        trainer, module = training(prepared, place, [watch], len(batches), ACCUMULATED)
        use.start()
        trainer.fit(module, train_dataloaders=batch_loader(batches, is_on_gpu=place.device == "cuda"))
    _report_memory(report, "training", watch.training, prepared.plan.training)
    _report_memory(report, "captions", watch.generation, prepared.plan.generation)
    _report_speed(report, prepared, watch, is_bounded=is_bounded)
    devices = [parameter.device.type for parameter in prepared.captioner.parameters()]
    report.add(
        "after the fit", "share of weights on the device", devices.count(place.device) / len(devices), limits.ALL
    )
    weights = sum(parameter.numel() * parameter.element_size() for parameter in prepared.captioner.parameters())
    report.add("training", "host memory grown, GiB", host.grown_gib)
    report.add(
        "training",
        "host memory grown over weights",
        host.grown_gib * GIB / weights,
        limits.HOST if is_bounded else None,
    )
    return watch


class Watch(L.Callback):
    """Counts waits in the middle micro-batches, times the last ones, and decodes captions where a run would evaluate.

    Args:
        place: Where it runs.
        use: Peaks of memory.
        prepared: Configuration and model.
        num_slots: Captions that are decoded together.

    Attributes:
        seconds: Seconds of the prompts of an evaluation batch ("prompt"), and of a token of all its captions ("token").
        per_token: Launches of `PROFILED` tokens.
    """

    def __init__(self, place: Place, use: MemoryMeter, prepared: Prepared, num_slots: int) -> None:
        self.place, self.use, self.prepared, self.num_slots = place, use, prepared, num_slots
        self.waits = Waits(place.device)
        self.micro_s = 0.0
        self._sums: list[tuple[Any, int]] = []  # losses stay on the device, as reading them would be a wait
        self.training = self.generation = PeakMemory()
        self.context_gib = 0.0
        self.seconds: dict[str, float] = {}
        self.per_token = launches(lambda: None, place.device)
        self._started = 0.0

    @property
    def losses(self) -> list[float]:
        """Loss per label token of each micro-batch, in nats."""
        return [float(loss) / max(1, count) for loss, count in self._sums]

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Turns counter and clock on and off between micro-batches."""
        self._sums.append(pl_module.last_loss)
        if batch_idx + 1 == WARM:
            wait(self.place.device)
            self.waits.start()
        elif batch_idx + 1 == WARM + COUNTED:
            self.waits.stop()
            wait(self.place.device)
            self._started = time.perf_counter()
        elif batch_idx + 1 == WARM + COUNTED + TIMED:
            wait(self.place.device)
            self.micro_s = (time.perf_counter() - self._started) / TIMED

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        """Restores PyTorch's settings."""
        self.waits.stop()

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Decodes captions while gradients and optimiser state are in memory, as in a run's validation."""
        self.training, self.context_gib = self.use.peak(), self.use.context_gib()
        pl_module.eval()
        self.use.start()
        write, device = writer(self.prepared, trainer, pl_module, self.num_slots), self.place.device
        longer, shorter = (launches(lambda count=count: write(count), device) for count in (1 + PROFILED, 1))
        self.per_token = longer - shorter
        # The profiled captions have allocated the memory and chosen the kernels.
        prompt_s, whole_s = (timed(write, count, device) for count in (1, NUM_NEW))
        self.generation = self.use.peak()
        self.seconds = {"prompt": prompt_s, "token": max(whole_s - prompt_s, 0.0) / (NUM_NEW - 1)}


def timed(write: Any, count: int, device: str) -> float:
    """Returns the seconds of captions of a number of tokens."""
    wait(device)
    started = time.perf_counter()
    write(count)
    wait(device)
    return time.perf_counter() - started


def _report_memory(report: Report, case: str, found: PeakMemory, planned: Moment) -> None:
    total = planned.total / GIB
    tensors = total - planned.sizes.get("fragmentation", 0.0) / GIB
    for name, measured, plan, limit in (
        ("allocated", found.allocated, tensors, limits.ALLOCATED),
        ("reserved", found.reserved, total, limits.RESERVED),
    ):
        report.add(case, f"{name} over planned", measured / plan, limit, note=f"{measured:.2f} of {plan:.2f} GiB")


def _report_speed(report: Report, prepared: Prepared, watch: Watch, *, is_bounded: bool) -> None:
    plan, batch_size, num_slots = prepared.plan, prepared.config.data.batch_size, watch.num_slots
    waits = watch.waits.count / COUNTED
    report.add("training", "host waits per micro-batch", waits, limits.WAITS if is_bounded else None)
    is_finite = all(map(math.isfinite, watch.losses))
    report.add("training", "losses are numbers", is_finite, limits.ALL)
    peak = peak_flops() if watch.place.device == "cuda" else planned_device(prepared.config).peak_flops
    if peak is None:
        report.skip("training", "the peak of this GPU is not known, so there is no utilisation")
    else:
        flops, with_repeats = _needed_flops(prepared) * batch_size, plan.flops * batch_size
        bound = limits.MFU if is_bounded else None
        report.add("training", "utilisation (MFU), without what is computed again", flops / watch.micro_s / peak, bound)
        report.add("training", "utilisation with what is computed again", with_repeats / watch.micro_s / peak)
    report.add("training", "seconds per clip", watch.micro_s / batch_size)
    report.add("training", "planned seconds per clip", plan.clip_s)
    report.add("training", "memory beside PyTorch, GiB", watch.context_gib)
    case = f"captions, {num_slots} slots"
    report.add(case, "ms per token", 1e3 * watch.seconds["token"])
    report.add(case, "planned ms per token", 1e3 * plan.token_s)
    report.add(case, "launches per token", watch.per_token.count / PROFILED)
    report.add(case, "planned launches per token", plan.token_launches)
    report.add(case, "busy share of a token", watch.per_token.busy_s / PROFILED / max(watch.seconds["token"], 1e-9))


def _needed_flops(prepared: Prepared) -> float:
    """Returns the operations per clip, without those that gradient checkpointing repeats."""
    config = prepared.config
    if not config.hardware.gradient_checkpointing:
        return prepared.plan.flops
    hardware = dataclasses.replace(
        config.hardware, gradient_checkpointing=False, activation_budget_gib=None, offload_checkpoints=False
    )
    return make_plan(dataclasses.replace(config, hardware=hardware), planned_device(config)).flops
