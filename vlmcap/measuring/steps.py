"""Training steps and captions of a captioner with random weights, as a run would take them: their time and their memory.

Legend: B clips, F frames, P patches a frame, Dv vision width.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vlmcap.assembly.parts import dtype_of
from vlmcap.config import Config, Precision
from vlmcap.models.captioner import VideoCaptioner
from vlmcap.planning.estimate.meta_models import PROMPT_TOKENS, sketch, text_config
from vlmcap.planning.estimate.sizes import Sizes, frames_shape, language_batch
from vlmcap.planning.hardware import GIB
from vlmcap.training.checkpoints.load import trained_parameters
from vlmcap.training.optimizer import make_optimizer
from vlmcap.training.schedule import StagePlan
from vlmcap.types import Batch

NUM_STEPS = 3  # of the optimiser; the first one is not timed, as it takes memory and chooses kernels
MOST_MICRO = 2  # batches a step where gradients are accumulated: the second finds the gradients of the first, as all later ones would
_RATE = 1e-6
_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # of glibc's mallopt
_LARGE = 1 << 16  # bytes: what is larger goes back to the system when it is freed
_MOST_ID = 1000  # random ids stay below, where no vocabulary has special tokens


def random_batch(config: Config, sizes: Sizes, num_clips: int, num_caption: int, device: str) -> Batch:
    """A batch of the largest clips that a configuration may meet: random frames, or features where they are stored.

    Args:
        config: Of the run.
        sizes: Of a clip.
        num_clips: B.
        num_caption: Tokens of each caption; 0 makes a batch for generation.
        device: Where it is made.
    """
    encoder = sketch(config)
    shape = frames_shape(config, encoder, sizes.grid)
    varies = config.is_whole or shape[1] != 3
    batch = language_batch(num_clips, sizes.runs, PROMPT_TOKENS, num_caption, sizes.grid if varies else None, sizes.gap)
    most = min(_MOST_ID, int(text_config(config).vocab_size))
    ids = torch.randint(1, most, batch.input_ids.shape) if not config.is_whole else batch.input_ids
    targets = None if batch.label_places is None else ids.flatten()[batch.label_places + 1]
    batch = dataclasses.replace(batch, input_ids=ids, targets=targets).to(device, non_blocking=False)
    if config.cache.enabled is True:
        frames, rows, columns = sizes.grid
        dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}.get(config.cache.dtype, torch.float16)
        features = torch.randn(num_clips, frames, rows * columns, sizes.embed_dim, dtype=dtype, device=device)
        return dataclasses.replace(batch, features=features)
    return dataclasses.replace(batch, frames=torch.randint(0, 256, (num_clips, *shape), dtype=torch.uint8, device=device))


def autocast(config: Config, device: str) -> torch.autocast:
    """What Lightning computes in under `hardware.precision`."""
    precision = config.hardware.precision
    is_mixed = precision is not Precision.fp32
    return torch.autocast(torch.device(device).type, dtype=dtype_of(precision) if is_mixed else None, enabled=is_mixed)


class Training:
    """Steps of the optimiser that is configured, on all that any stage trains, in Lightning's order.

    Args:
        config: Of the run.
        captioner: With random weights.
    """

    def __init__(self, config: Config, captioner: VideoCaptioner) -> None:
        self.config, self.captioner, self.device = config, captioner, str(captioner.device)
        trained = trained_parameters(captioner, StagePlan(config.tuning.stages))
        self.parameters: list[nn.Parameter] = [parameter for part in trained.values() for parameter in part.values()]
        for parameter in self.parameters:
            parameter.requires_grad_(True)
        self.optimizer = make_optimizer(trained, config.optim)
        for group in self.optimizer.param_groups:
            group["lr"] = _RATE
        self.scaler = torch.amp.GradScaler(torch.device(self.device).type, enabled=config.hardware.precision is Precision.fp16)
        captioner.train()
        if captioner.encoder is not None and "encoder" not in trained:
            captioner.encoder.eval()

    def run(self, batch: Batch, say: Callable[[str], None]) -> float:
        """Seconds a clip of the steps behind the first, the optimiser's share of the accumulated batches in it.

        Args:
            batch: A micro-batch, which all steps take.
            say: Told how far it is.
        """
        accumulate = self.config.trainer.accumulate_grad_batches
        micro_s, optimizer_s = [], []
        for step in range(NUM_STEPS):
            for index in range(min(accumulate, MOST_MICRO)):
                seconds = self._timed(partial(self._accumulate, batch, is_first=index == 0))
                micro_s += [seconds] if step else []
            seconds = self._timed(self._step)
            optimizer_s += [seconds] if step else []
            say(f"training step {step + 1} of {NUM_STEPS}")
        per_batch_s = sum(micro_s) / len(micro_s) + sum(optimizer_s) / len(optimizer_s) / accumulate
        return per_batch_s / len(batch)

    def _accumulate(self, batch: Batch, *, is_first: bool) -> None:
        with autocast(self.config, self.device):
            loss, num_labels = self.captioner.loss_sum(batch)
        if is_first:  # behind the forward pass, as Lightning does it
            self.optimizer.zero_grad()
        scaled: Tensor = self.scaler.scale(loss / num_labels)
        scaled.backward()

    def _step(self) -> None:
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.parameters, self.config.optim.max_grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def _timed(self, work: Callable[[], None]) -> float:
        return timed(work, self.device)


def timed(work: Callable[[], Any], device: str) -> float:
    """Seconds of the work, all that it gave the device to do included."""
    _wait(device)
    started = time.perf_counter()
    work()
    _wait(device)
    return time.perf_counter() - started


def _wait(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def token_seconds(config: Config, captioner: VideoCaptioner, batch: Batch, num_new: int, say: Callable[[str], None]) -> float:
    """Seconds of a caption token of every clip: what captions of `num_new` tokens take over captions of one.

    Args:
        config: Of the run.
        captioner: Set to evaluation.
        batch: For generation.
        num_new: Tokens of the longer captions, 2 at least.
        say: Told how far it is.
    """
    captioner.eval()
    device, chosen = str(captioner.device), captioner.generation
    settings = dataclasses.replace(chosen, rules=dataclasses.replace(chosen.rules, do_sample=False))

    def write(count: int) -> None:
        captioner.generation = dataclasses.replace(settings, max_new_tokens=count)
        with autocast(config, device):
            captioner.generate(batch)

    write(2)  # takes memory, chooses kernels
    say("captions of 2 tokens")
    first_s = timed(lambda: write(1), device)
    say("captions of 1 token")
    whole_s = timed(lambda: write(num_new), device)
    say(f"captions of {num_new} tokens")
    return max(whole_s - first_s, 1e-9) / (num_new - 1)


@contextlib.contextmanager
def gone_after(device: str) -> Iterator[None]:
    """Gives memory back at the end, whatever that was."""
    try:
        yield
    finally:
        gc.collect()
        if torch.device(device).type == "cuda":
            torch.cuda.empty_cache()


@dataclass(frozen=True, slots=True)
class Use:
    """Memory in use, in GiB.

    Attributes:
        allocated: By tensors, at most; on a CPU by the process, over what it had before the model.
        reserved: Held by PyTorch's allocator, at most; the same as `allocated` on a CPU.
    """

    allocated: float
    reserved: float


class MemoryUse:
    """Peaks of phases.

    Args:
        device: "cpu", or a CUDA device.
    """

    def __init__(self, device: str) -> None:
        self.device, self.is_cuda = device, torch.device(device).type == "cuda"
        if not self.is_cuda:
            _return_freed_memory()
        self._base = 0.0 if self.is_cuda else resident("VmRSS")

    def start(self) -> None:
        """Begins a phase: what is not needed goes back, and the peak is counted anew."""
        gc.collect()
        if self.is_cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            reset_peak()

    def peak(self) -> Use:
        """The most since the phase began."""
        if self.is_cuda:
            allocated = torch.cuda.max_memory_allocated(self.device) / GIB
            return Use(allocated, torch.cuda.max_memory_reserved(self.device) / GIB)
        grown = (resident("VmHWM") - self._base) / GIB
        return Use(grown, grown)

    def context_gib(self) -> float:
        """What is taken on the card beside PyTorch's allocator: the context, kernels and workspaces, and other programs'."""
        if not self.is_cuda:
            return 0.0
        free, total = torch.cuda.mem_get_info(self.device)
        return (total - free - torch.cuda.memory_reserved(self.device)) / GIB


def reset_peak() -> None:
    """Linux alone keeps a peak that can be set back."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def resident(name: str) -> float:
    """Bytes of the process in memory, now ("VmRSS") or at most ("VmHWM")."""
    with open("/proc/self/status", encoding="ascii") as file:
        line = next(line for line in file if line.startswith(name))
    return float(line.split()[1]) * 1024


def _return_freed_memory() -> None:
    """Makes glibc give back what was freed, now and from now on, as the resident set is to show what is alive."""
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.mallopt(_MMAP_THRESHOLD, _LARGE)
        library.mallopt(_TRIM_THRESHOLD, _LARGE)
        library.malloc_trim(0)
