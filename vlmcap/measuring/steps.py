"""Times training steps and captions with random weights by the trainer of a run, and measures their memory.

Legend: B clips, F frames, P patches per frame, Dv vision width.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import random
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader

from vlmcap.config import Batching, Config, Stage
from vlmcap.data.skipped_clips import SkippedClipLog
from vlmcap.determinism import deterministic_kernels
from vlmcap.measuring.memory_use import MemoryMeter, PeakMemory, resident_bytes
from vlmcap.models.captioner import VideoCaptioner
from vlmcap.planning.caption_lengths import CaptionLengths
from vlmcap.planning.estimate.meta_models import PROMPT_TOKENS, meta_encoder, text_config
from vlmcap.planning.estimate.sizes import Sizes, frames_shape, language_batch
from vlmcap.planning.hardware import GIB
from vlmcap.training.fitting import reraising_interrupts
from vlmcap.training.objects import make_module, make_trainer
from vlmcap.training.schedule import StagePlan
from vlmcap.types import Batch, ValidationBatch

NUM_TIMED = 2  # optimiser steps on captions with the data's lengths
# A warm-up step allocates memory and chooses kernels, and a last one on the longest captions takes the most memory.
NUM_STEPS = NUM_TIMED + 2
# Most micro-batches per step: with accumulation the second finds the gradients of the first, like all later ones.
MAX_MICRO_BATCHES = 2
_LEARNING_RATE = 1e-6
_MAX_ID = 1000  # random ids are smaller, where no vocabulary has special tokens


@dataclasses.dataclass(frozen=True, slots=True)
class Measurement:
    """Memory and time of training steps and captions.

    Attributes:
        training: Memory of the training steps.
        generation: Memory of the validation, in which captions are decoded.
        context_gib: GPU memory beside PyTorch's allocator.
        clip_s: Seconds per clip of a training step, with the optimizer's share over the accumulated batches.
        token_s: Seconds of one caption token of every clip of an evaluation batch.
        num_new: Tokens of the longest caption that was timed.
        process_gib: Peak host memory of the process, where the model is on a GPU; otherwise 0.
    """

    training: PeakMemory
    generation: PeakMemory
    context_gib: float
    clip_s: float
    token_s: float
    num_new: int
    process_gib: float = 0.0


def random_batch(config: Config, sizes: Sizes, captions: Sequence[int]) -> Batch:
    """Makes a batch of the largest clips of a configuration, with random frames, or features where they are stored.

    Args:
        config: Run configuration.
        sizes: Sizes of a clip.
        captions: Caption tokens of each clip; zeros for a batch for generation.
    """
    encoder = meta_encoder(config)
    shape = frames_shape(encoder, sizes.grid)
    # The batch carries grids for complete models, for encoders that join frames, and for frames as rows of patches.
    varies = config.is_pretrained_vlm or getattr(encoder, "frames_per_token", 1) > 1 or shape[1] != 3
    is_packed = config.data.batching is Batching.packed and any(captions)
    batch = language_batch(
        captions, sizes.runs, PROMPT_TOKENS, sizes.grid if varies else None, sizes.gap, is_packed=is_packed
    )
    most = min(_MAX_ID, int(text_config(config).vocab_size))
    # Id 0 is padding.
    ids = torch.randint(1, most, batch.input_ids.shape) if not config.is_pretrained_vlm else batch.input_ids
    # (labels,): the token after each position that has a label.
    targets = None if batch.label_indices is None else ids.flatten()[batch.label_indices + 1]
    batch = dataclasses.replace(batch, input_ids=ids, targets=targets)
    if config.cache.enabled is True:
        num_frames, height, width = sizes.grid
        dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}.get(config.cache.dtype, torch.float16)
        return dataclasses.replace(
            batch,
            features=torch.randn(
                len(captions), num_frames, height * width, sizes.embed_dim, dtype=dtype
            ),  # (B, F, P, Dv)
        )
    return dataclasses.replace(batch, frames=torch.randint(0, 256, (len(captions), *shape), dtype=torch.uint8))


def step_captions(lengths: CaptionLengths, batch_size: int, num_micro: int, *, is_sorted: bool) -> list[list[int]]:
    """Returns caption lengths of the micro-batches of all steps: warm-up, the data's lengths, and the longest last.

    Args:
        lengths: Caption lengths of the data.
        batch_size: Clips per micro-batch.
        num_micro: Micro-batches per optimizer step.
        is_sorted: Whether clips of similar length share a batch.
    """
    count = NUM_TIMED * num_micro
    timed = lengths.spread(count * batch_size)
    if not is_sorted:
        random.Random(0).shuffle(timed)
    batches = [timed[start : start + batch_size] for start in range(0, len(timed), batch_size)]
    return (
        [batches[index % count] for index in range(num_micro)] + batches + [[lengths.longest] * batch_size] * num_micro
    )


def ending_ids(captions: Sequence[Sequence[int]]) -> list[int]:
    """Chooses end tokens that stop captions at different positions of their second halves, as far as possible.

    Args:
        captions: Captions that were decoded without end tokens.
    """
    longest = max(map(len, captions))
    half = longest // 2
    # Spread evenly over the second half of the longest caption.
    wanted_ends = [half + index * (longest - half) // len(captions) for index in range(len(captions))]
    # An end token must not stop another caption early: it occurs in none of them before the end that is wanted there.
    before_ends = {token for caption, end in zip(captions, wanted_ends, strict=True) for token in caption[:end]}
    end_ids = []
    for caption, end in zip(captions, wanted_ends, strict=True):
        end_ids += [token for token in caption[end:] if token not in before_ends][:1]
    return end_ids


class _Clock(L.Callback):
    """Measures time and memory of the trainer's phases."""

    def __init__(
        self, captioner: VideoCaptioner, num_micro: int, num_new: int, meter: MemoryMeter, report: Callable[[str], None]
    ) -> None:
        self.captioner = captioner
        self.num_micro = num_micro
        self.num_new = num_new
        self.meter = meter
        self.report = report
        self.micro_s: list[float] = []  # forward and backward passes of timed steps
        self.optimizer_s: list[float] = []
        self.training = PeakMemory()
        self.context_gib = 0.0
        self.captions: list[list[list[int]]] = []
        self.caption_s: list[float] = []
        self._lap_start_s, self._has_stepped = 0.0, False

    def _lap(self) -> float:
        """Returns the seconds since the last call, after all work of the device is done."""
        if self.captioner.device.type == "cuda":
            torch.cuda.synchronize(self.captioner.device)
        started, self._lap_start_s = self._lap_start_s, time.perf_counter()
        return self._lap_start_s - started

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begins the training phase."""
        self.meter.start()
        self._lap()  # starts the clock

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        """Ends the passes of the last micro-batch of a step."""
        self._note(trainer, self.micro_s)
        self._has_stepped = True

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Ends a micro-batch, or the optimizer step after it."""
        self._note(trainer, self.optimizer_s if self._has_stepped else self.micro_s, batch_idx)
        self._has_stepped = False
        if (batch_idx + 1) % self.num_micro == 0:
            self.report(f"training step {(batch_idx + 1) // self.num_micro} of {NUM_STEPS}")

    def _note(self, trainer: L.Trainer, into: list[float], batch_idx: int | None = None) -> None:
        index = trainer.fit_loop.epoch_loop.batch_idx if batch_idx is None else batch_idx
        seconds = self._lap()
        # Step 0 warms up, and the one after the timed steps measures memory.
        if 1 <= index // self.num_micro <= NUM_TIMED:
            into.append(seconds)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begins the generation phase, with what a run keeps in memory during validation."""
        self.training, self.context_gib = self.meter.peak(), self.meter.context_gib()
        self.meter.start()

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Sets the caption length: the longest without end tokens, one token, and the longest with end tokens."""
        tokens = (self.num_new, 1, self.num_new)[batch_idx]
        self.captioner.generation = dataclasses.replace(self.captioner.generation, max_new_tokens=tokens)
        if len(self.captions) == 2:
            # Known only now: the ids are chosen from the captions of the first batch, which are the same each time.
            self.captioner.prompt.stop_ids = ending_ids(self.captions[0])  # type: ignore[misc]
        self._lap()

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Stores the captions and their seconds."""
        self.caption_s.append(self._lap())
        self.captions.append(outputs.captions)
        self.report(f"captions of up to {max(map(len, outputs.captions))} tokens")

    @property
    def longest(self) -> int:
        """Tokens of the longest caption that was timed."""
        return max(map(len, self.captions[-1]))

    @property
    def token_s(self) -> float:
        """Seconds per token: the difference of long captions and captions of one token."""
        # One token costs the encoder and the prompt, which the difference drops.
        return max(self.caption_s[2] - self.caption_s[1], 1e-9) / max(1, self.longest - 1)


def measure_run(
    config: Config,
    captioner: VideoCaptioner,
    *,
    sizes: Sizes,
    lengths: CaptionLengths,
    batch_size: int,
    folder: Path,
    meter: MemoryMeter,
    report: Callable[[str], None],
) -> Measurement:
    """Runs optimizer steps on all that any stage trains, then validates, with the module and the trainer of a run.

    Args:
        config: Run configuration; `llm.new_tokens` is the most tokens of a caption.
        captioner: Captioner with random weights.
        sizes: Sizes of a clip.
        lengths: Caption lengths of the data.
        batch_size: Clips per micro-batch.
        folder: Folder that the trainer may write to.
        meter: Memory meter of the two phases.
        report: Receives the progress.
    """
    # 1. The batches: prompts of the evaluation batch size, and the longest captions for the validation loss.
    accumulated = config.trainer.accumulate_grad_batches
    num_micro = min(accumulated, MAX_MICRO_BATCHES)
    config = dataclasses.replace(config, trainer=dataclasses.replace(config.trainer, accumulate_grad_batches=num_micro))
    is_sorted = config.data.batching is not Batching.shuffled
    captions_of_batches = step_captions(lengths, batch_size, num_micro, is_sorted=is_sorted)
    assert config.data.eval_batch_size is not None, "the plan has decided"
    prompts = random_batch(config, sizes, [0] * config.data.eval_batch_size)
    labelled = random_batch(config, sizes, [lengths.longest] * min(config.data.batch_size, len(prompts)))
    labelled = dataclasses.replace(labelled, frames=None, features=None)  # its features are those of the prompts
    # 2. The trainer and the module of a run, for one epoch that trains all that any stage trains.
    clock = _Clock(captioner, num_micro, config.llm.new_tokens, meter, report)
    plan = StagePlan({"measured": _fullest_stage(config)})
    trainer = make_trainer(config, plan, folder, [clock], [], check_val_every_n_epoch=1)
    module = make_module(config, captioner, plan, {}, SkippedClipLog(folder / "skipped_clips.jsonl", 0.0, 1))
    batches = [random_batch(config, sizes, captions) for captions in captions_of_batches]
    # The validation loss is computed in the batch that is not timed.
    validation = [ValidationBatch(prompts, (labelled,)), ValidationBatch(prompts, ()), ValidationBatch(prompts, ())]
    loader, validation_loader = (batch_loader(one, is_on_gpu=meter.is_cuda) for one in (batches, validation))
    with deterministic_kernels(config.is_deterministic), reraising_interrupts(trainer):
        trainer.fit(module, loader, validation_loader)
    # 3. A clip's share of a step: the passes of a micro-batch, and of the optimizer step that several of them share.
    step_s = sum(clock.micro_s) / len(clock.micro_s) + sum(clock.optimizer_s) / len(clock.optimizer_s) / accumulated
    context_gib = max(clock.context_gib, meter.context_gib())
    process_gib = resident_bytes("VmHWM") / GIB if meter.is_cuda else 0.0
    return Measurement(
        clock.training, meter.peak(), context_gib, step_s / batch_size, clock.token_s, clock.longest, process_gib
    )


def _fullest_stage(config: Config) -> Stage:
    """Returns one epoch that trains all that any stage trains, with rates so low that random weights stay finite."""
    # A part is trained if any stage trains it.
    stages = config.tuning.stages.values()
    rates = ("encoder_lr", "projector_lr", "adapter_lr", "llm_lr")
    return Stage(
        epochs=1,
        **{rate: _LEARNING_RATE if any(getattr(stage, rate) > 0 for stage in stages) else 0.0 for rate in rates},
    )


def batch_loader(batches: Sequence[Batch | ValidationBatch], *, is_on_gpu: bool) -> DataLoader[Any]:
    """Returns a loader of ready batches, for a GPU in page-locked memory as in a run."""
    return DataLoader(batches, batch_size=None, collate_fn=lambda batch: batch, pin_memory=is_on_gpu)  # type: ignore[arg-type]


@contextlib.contextmanager
def releasing_memory(device: str) -> Iterator[None]:
    """Releases memory at the end, also after an error."""
    try:
        yield
    finally:
        gc.collect()
        if torch.device(device).type == "cuda":
            torch.cuda.empty_cache()
