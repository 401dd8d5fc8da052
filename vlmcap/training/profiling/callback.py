"""Profiles training: a few steps are timed phase by phase, and the next few steps are traced.

On a GPU, timed steps synchronise with the device between phases, because kernels run asynchronously. Host and device
then no longer overlap, so a timed step is slower than others.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import lightning as L
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import Dataset, get_worker_info
from torch.utils.hooks import RemovableHandle

from vlmcap.config import Config, ProfileConfig
from vlmcap.files import replacing
from vlmcap.training.module import CaptioningModule
from vlmcap.training.profiling.profiler import EVALUATION, PLAIN, TIMED, TRACED, PhaseProfiler, hook_modules
from vlmcap.training.profiling.report import AROUND_LABELS, LABELS, StepTimes, draw_times, show_times, write_times
from vlmcap.types import Batch, Clip, Sample, Skipped

if TYPE_CHECKING:
    from vlmcap.data.loading.datamodule import CaptionDataModule

TRACE = "trace.json.gz"
_MAX_WORKERS = 256  # workers per loader; further ones share the last counter and may overwrite each other
T_co = TypeVar("T_co", covariant=True)


class TimedDataset(Dataset[T_co]):
    """A map-style data set that measures how long reading takes.

    Args:
        dataset: The data set to read.
        totals: Seconds and clips by worker, (W, 2), in memory that workers share with the main process.
    """

    def __init__(self, dataset: Dataset[T_co], totals: torch.Tensor) -> None:
        self.dataset, self.totals = dataset, totals

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, key: Any) -> T_co:
        started = time.perf_counter()
        sample = self.dataset[key]
        worker = get_worker_info()
        row = self.totals[0 if worker is None else min(worker.id, _MAX_WORKERS - 1)]  # one row per worker needs no lock
        row[0] += time.perf_counter() - started
        row[1] += 1
        return sample


def read_seconds(before: torch.Tensor, after: torch.Tensor) -> float:
    """Returns the mean seconds per clip that was read during the timed steps.

    Workers read ahead, so these are clips of later steps. If all clips were read before, it is the mean of the run so
    far.

    Args:
        before: Seconds and clips before the timed steps, (2,).
        after: Seconds and clips after the timed steps, (2,).
    """
    # With prefetched batches no clip may be read in the timed steps; then the mean is over all reads so far.
    seconds, clips = (after - before if after[1] > before[1] else after).tolist()
    return float(seconds) / max(1.0, float(clips))


class StepProfile(L.Callback):
    """Times a few steps and all evaluations, traces a few more steps, and reports at the end of training.

    Args:
        settings: Steps to time and to trace.
        folder: Folder of `steps.json`, `steps.png` and `trace.json.gz`; created when there is something to write.
    """

    def __init__(self, settings: ProfileConfig, folder: Path) -> None:
        self.settings, self.folder = settings, folder
        self.profiler = PhaseProfiler(self._before_fetch)
        # Float64 sums in shared memory, which forked and spawned workers alike write to.
        self.read_totals = torch.zeros(_MAX_WORKERS, 2, dtype=torch.float64).share_memory_()
        self._reads = (torch.zeros(2), torch.zeros(2))  # seconds and clips before and after the timed steps
        self._module: CaptioningModule | None = None
        self._stage = "before"  # stage of the current step: before, TIMED, TRACED, PLAIN or over
        self._trace: profile | None = None
        self._is_traced = False
        self._handles: list[RemovableHandle] = []
        self._start = self._number = self._clips = self._evaluations = 0

    def watching(
        self, make_dataset: Callable[[Sequence[Clip]], Dataset[Sample | Skipped]], clips: Sequence[Clip]
    ) -> Callable[[Sequence[Clip]], Dataset[Sample | Skipped]]:
        """Wraps `make_dataset` so that reads of the training clips `clips` are timed."""

        def make(chosen: Sequence[Clip]) -> Dataset[Sample | Skipped]:
            dataset = make_dataset(chosen)
            # Only training reads are timed; evaluation makes data sets of other clips.
            return TimedDataset(dataset, self.read_totals) if chosen is clips else dataset

        return make

    # --- hooks of Lightning

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Starts to count steps."""
        assert isinstance(pl_module, CaptioningModule)
        self._module, self._start = pl_module, trainer.global_step
        self.profiler.device = pl_module.device

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Counts the clips of timed steps."""
        if self._stage == TIMED:
            # A clip that could not be read has taken time too.
            self._clips += len(batch) + len(batch.skipped)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Ends the step and waits for the device, so that its remaining work does not count as evaluation."""
        self.profiler.end()
        self.profiler.wait_for_device()
        self.profiler.begin(EVALUATION)

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Starts the phase of captions, which includes the loss of the batch."""
        self.profiler.start("captions")

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Ends the phase of captions."""
        self.profiler.stop("captions")

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Ends an evaluation."""
        self.profiler.end()
        self._evaluations += 1

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Ends the step, because the work at the end of an epoch belongs to none."""
        self.profiler.end()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Prints and writes the report."""
        self._enter("over")
        if trainer.is_global_zero:
            self._report(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Discards the open section and trace of a failed run."""
        self.profiler.end()
        if self._trace is not None:
            self._trace.stop()
            self._trace = None
        self._enter("over")

    # --- from step to step

    @property
    def _done(self) -> int:
        """Optimiser steps of this process."""
        assert self._module is not None
        return self._module.trainer.global_step - self._start

    def _before_fetch(self) -> None:
        """Ends a step and begins the next one, if the next batch belongs to another step."""
        number = self._done + 1
        if number != self._number:  # otherwise another micro-batch of the same step
            self._number = number
            self._enter(self._stage_of(number))
        # The wait for the first batch of a step belongs to it, so the section begins before the fetch.
        if self._stage != "before" and self.profiler.section is None:
            self.profiler.begin(self._stage)

    def _stage_of(self, number: int) -> str:
        """Returns the stage of a step, counted from 1."""
        # Steps before `first` warm up: allocator, kernels and workers.
        first, timed, traced = self.settings.first_step, self.settings.num_steps, self.settings.trace_steps
        ends = {"before": first, TIMED: first + timed, TRACED: first + timed + traced}
        return next((stage for stage, end in ends.items() if number < end), PLAIN)

    def _enter(self, stage: str) -> None:
        """Ends the current section, and changes to another stage if it differs."""
        self.profiler.end()
        before, self._stage = self._stage, stage
        if before == stage:
            return
        # Sums of the reads at both ends of the timed steps; their difference is what the steps have read.
        if before == TIMED:
            self._reads = self._reads[0], self.read_totals.sum(dim=0)
        if self._trace is not None:
            self._write_trace()
        if stage == TIMED:
            assert self._module is not None
            self._reads = self.read_totals.sum(dim=0), self._reads[1]
            self._handles = hook_modules(self._module.captioner, self.profiler)
        elif stage == TRACED:
            os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # silences its messages on stderr at start and stop
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
            self._trace = profile(activities=activities)
            self._trace.start()
        # Hooks stay during traced steps, for the spans of their phases.
        else:
            for handle in self._handles:
                handle.remove()

    def _write_trace(self) -> None:
        """Stops the trace, and writes it in the first process."""
        assert self._trace is not None and self._module is not None
        self._trace.stop()
        if self._module.trainer.is_global_zero:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory() as folder, replacing(self.folder / TRACE) as partial:
                self._trace.export_chrome_trace(f"{folder}/{TRACE}")
                shutil.copyfile(f"{folder}/{TRACE}", partial)
            self._is_traced = True
        self._trace = None

    # --- at the end

    def _report(self, trainer: L.Trainer) -> None:
        # The run may have ended within the timed steps.
        num_steps = min(self._done + 1 - self.settings.first_step, self.settings.num_steps)
        if num_steps < 1:
            first = self.settings.first_step
            print(f"No profile: the run ended before step {first} did; lower callbacks.profile.first_step.")
            return
        times = self._times(trainer, num_steps)
        self.folder.mkdir(parents=True, exist_ok=True)
        write_times(times, self.folder / "steps.json")
        show_times(times)
        draw_times(times, self.folder / "steps.png")
        if self.settings.trace_steps and not self._is_traced:
            print("No profile/trace.json.gz: the run ended before a traced step; lower callbacks.profile.num_steps.")
        for logger in trainer.loggers:
            logger.log_metrics(times.metrics() | {"epoch": trainer.current_epoch}, step=trainer.global_step)

    def _times(self, trainer: L.Trainer, num_steps: int) -> StepTimes:
        assert self._module is not None
        # The encoder is not in the model if its features are stored.
        seconds, is_cached = self.profiler.seconds, self._module.captioner.encoder is None
        phases = {name: seconds[TIMED][name] / num_steps for name in LABELS}
        num_workers = int(getattr(trainer.train_dataloader, "num_workers", 0))
        # Mean seconds per clip × clips per step.
        decode_s = read_seconds(*self._reads) * self._clips / num_steps
        if num_workers:
            del phases["decode"]
        else:  # clips are read in this process, within the wait for the batch
            phases["decode"], phases["wait"] = decode_s, phases["wait"] - decode_s
        if is_cached:
            del phases["vision"]
        # On the CPU nothing is transferred.
        if self.profiler.device.type == "cpu":
            phases["other"] += phases.pop("transfer")
        evaluation = seconds[EVALUATION]
        # Optimiser steps that the evaluations of this run stand for.
        evaluated_steps = self._evaluations * self._module.steps_per_epoch * (trainer.check_val_every_n_epoch or 1)
        # Steps after the traced ones, which nothing slows down.
        num_plain = self._done + 1 - self.settings.first_step - self.settings.num_steps - self.settings.trace_steps
        return StepTimes(
            device=self.profiler.device.type,
            first_step=self.settings.first_step,
            num_steps=num_steps,
            clips=round(self._clips / num_steps, 2),
            num_workers=num_workers,
            is_cached=is_cached,
            step_s=self.profiler.wall[TIMED] / num_steps,
            phases=phases,
            worker_decode_s=decode_s if num_workers else None,
            evaluation={name: evaluation[name] / evaluated_steps for name in AROUND_LABELS} if evaluated_steps else {},
            plain_step_s=self.profiler.wall[PLAIN] / num_plain if num_plain > 0 else None,
            trace=TRACE if self._is_traced else None,
        )


def step_profile(config: Config, data: CaptionDataModule, folder: Path) -> StepProfile | None:
    """Builds the callback that times steps and reads of training data, or returns None if it is disabled."""
    if not config.callbacks.profile.enabled:
        return None

    callback = StepProfile(config.callbacks.profile, folder / "profile")
    # Before the loaders are built, which make their data sets by this function.
    data.make_dataset = callback.watching(data.make_dataset, data.clips["train"])
    return callback
