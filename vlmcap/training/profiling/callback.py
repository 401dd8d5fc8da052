"""Where a training step's time goes: timed by hooks around what is there, so that the model knows nothing of it.

Lightning tells a `Profiler` when it fetches, runs, steps; hooks on the modules tell the rest. A few steps are timed, the next few are
traced, and nothing is measured in the others but the clock at their border. On a GPU the timed steps wait for the card at each border, as
kernels run later than they are called; that takes away what the processor and the card do at the same time, so a timed step is slower.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import lightning as L
import torch
from torch.utils.data import Dataset
from torch.utils.hooks import RemovableHandle

from vlmcap.config import Config, ProfileConfig
from vlmcap.models.captioner import VideoCaptioner
from vlmcap.training.module import CaptioningModule
from vlmcap.training.profiling.clock import FETCH, Actions, EvaluationTimes, PartClock, PartSpans, PlainSteps, ReadTimes, Recorder
from vlmcap.training.profiling.hooks import Trace, hook_modules
from vlmcap.training.profiling.report import LABELS, StepTimes, draw_times, show_times, write_times
from vlmcap.types import Batch, Clip, Sample, Skipped

if TYPE_CHECKING:
    from vlmcap.data.loading.datamodule import CaptionDataModule

TRACE = "trace.json.gz"


class StepProfile(L.Callback):
    """Times and traces a few steps and evaluations; prints and writes at the end of training.

    Args:
        settings: Which steps.
        folder: For `steps.json`, `steps.png` and `trace.json.gz`; made when there is something to write.
    """

    def __init__(self, settings: ProfileConfig, folder: Path) -> None:
        self.settings, self.folder = settings, folder
        self.actions = Actions(self)
        self._reads, self._evaluation = ReadTimes(), EvaluationTimes()
        self._stage: Literal["before", "timing", "tracing", "after"] = "before"
        self._clock: PartClock | None = None
        self._recorder: Recorder | None = None
        self._trace: Trace | None = None
        self._is_traced = False
        self._handles: list[RemovableHandle] = []
        self._trainer: L.Trainer | None = None
        self._captioner: VideoCaptioner | None = None
        self._device = torch.device("cpu")
        self._start = self._number = self._num_steps = self._clips = 0
        self._plain = PlainSteps()

    def watching(
        self, make_dataset: Callable[[Sequence[Clip]], Dataset[Sample | Skipped]], clips: Sequence[Clip]
    ) -> Callable[[Sequence[Clip]], Dataset[Sample | Skipped]]:
        """A maker of data sets in place of `make_dataset` whose data set of `clips`, those of training, says how long reading took."""

        def make(chosen: Sequence[Clip]) -> Dataset[Sample | Skipped]:
            dataset = make_dataset(chosen)
            return self._reads.over(dataset) if chosen is clips else dataset

        return make

    # --- told by Lightning

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Counts steps from here."""
        assert isinstance(pl_module, CaptioningModule)
        self._trainer, self._captioner, self._device = trainer, pl_module.captioner, pl_module.device
        self._start = trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Counts the clips of timed steps."""
        if self._stage == "timing":
            self._clips += len(batch) + len(batch.skipped)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """A step ends before an evaluation."""
        self._pause()
        self._now()  # what the card still computes is not evaluation
        self._evaluation.start()

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Prompts come from the first loader, labelled batches for the loss from the second."""
        self._evaluation.is_captioning = dataloader_idx == 0

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """An evaluation ends."""
        self._evaluation.end()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """What an epoch's end takes belongs to no step."""
        self._pause()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Prints and writes what there is."""
        self._pause()
        self._finish(self._done() + 1, is_over=True)
        if trainer.is_global_zero:
            self._report(trainer, pl_module)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """A run that breaks leaves no trace of the steps it was in."""
        if self._trace is not None:
            self._trace.drop()
        self._trace, self._stage = None, "after"
        self._unhook()

    def action_starts(self, name: str, part: str | None) -> None:
        """Lightning begins something."""
        if name == FETCH:
            self._fetch()
        if part is not None and self._recorder is not None:
            self._recorder.enter(part)
        self._evaluation.action_starts(name)

    def action_stops(self, name: str, part: str | None) -> None:
        """Lightning has done something."""
        if part is not None and self._recorder is not None:
            self._recorder.leave()
        self._evaluation.action_stops(name)

    # --- from step to step

    def _done(self) -> int:
        """Steps of this process."""
        assert self._trainer is not None
        return self._trainer.global_step - self._start

    def _fetch(self) -> None:
        """Before a batch is fetched: a step may end here and another begin."""
        number = self._done() + 1
        if number != self._number:  # otherwise another micro-batch of the same step
            self._number = number
            if self._stage == "after":
                self._plain.begin()
            self._finish(number)
            if self._stage == "before" and number >= self.settings.first_step:
                self._begin_timing()
        if self._recorder is not None:
            self._recorder.resume()

    def _pause(self) -> None:
        self._plain.pause()
        if self._recorder is not None:
            self._recorder.pause()

    def _begin_timing(self) -> None:
        self._stage, self._clock = "timing", PartClock(self._now)
        self._recorder = self._clock
        self._reads.begin()
        assert self._captioner is not None
        self._handles = hook_modules(self._captioner, lambda: self._recorder)

    def _finish(self, number: int, *, is_over: bool = False) -> None:
        """Ends timing or tracing if step `number` is not of it any more, or training is over."""
        timed = number - self.settings.first_step
        if self._stage == "timing" and (timed >= self.settings.num_steps or is_over):
            self._pause()
            self._num_steps = timed
            self._reads.end()
            self._stage, self._recorder = "after", None
            if self.settings.trace_steps and not is_over:
                self._stage, self._recorder, self._trace = "tracing", PartSpans(), Trace()
        elif self._stage == "tracing" and (timed >= self.settings.num_steps + self.settings.trace_steps or is_over):
            self._pause()
            self._stage, self._recorder = "after", None
            self._write_trace()
        if self._stage == "after":
            self._unhook()

    def _write_trace(self) -> None:
        assert self._trace is not None
        trace, self._trace = self._trace, None
        if self._trainer is not None and self._trainer.is_global_zero:
            self.folder.mkdir(parents=True, exist_ok=True)
            trace.write(self.folder / TRACE)
            self._is_traced = True
        else:
            trace.drop()

    def _unhook(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._recorder, self._handles = None, []

    def _now(self) -> float:
        """Seconds, when the card has done all it was given."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    # --- at the end

    def _report(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._num_steps < 1:
            first = self.settings.first_step
            print(f"No profile, as the run ended before its step {first} did; lower callbacks.profile.first_step.")
            return
        times = self._times(trainer, pl_module)
        self.folder.mkdir(parents=True, exist_ok=True)
        write_times(times, self.folder / "steps.json")
        show_times(times)
        draw_times(times, self.folder / "steps.png")
        if self.settings.trace_steps and not self._is_traced:
            print("No profile/trace.json.gz, as the run ended with the timed steps or before; lower callbacks.profile.num_steps.")
        for logger in trainer.loggers:
            logger.log_metrics(times.metrics() | {"epoch": trainer.current_epoch}, step=trainer.global_step)

    def _times(self, trainer: L.Trainer, pl_module: L.LightningModule) -> StepTimes:
        assert self._clock is not None and self._captioner is not None
        assert isinstance(pl_module, CaptioningModule)
        parts = {name: self._clock.seconds[name] / self._num_steps for name in LABELS}
        num_workers = int(getattr(trainer.train_dataloader, "num_workers", 0))
        decode_s = self._reads.seconds_a_clip * self._clips / self._num_steps
        if num_workers:
            del parts["decode"]
        else:  # read in this process, while it waits for the batch
            parts["decode"], parts["wait"] = decode_s, parts["wait"] - decode_s
        if self._captioner.encoder is None:
            del parts["vision"]
        if self._device.type == "cpu":
            parts["other"] += parts.pop("transfer")
        steps_between = pl_module.steps_per_epoch * (trainer.check_val_every_n_epoch or 1)
        return StepTimes(
            device=self._device.type,
            first_step=self.settings.first_step,
            num_steps=self._num_steps,
            clips=round(self._clips / self._num_steps, 2),
            num_workers=num_workers,
            is_cached=self._captioner.encoder is None,
            step_s=self._clock.wall / self._num_steps,
            parts=parts,
            worker_decode_s=decode_s if num_workers else None,
            evaluation=self._evaluation.a_step(steps_between),
            plain_step_s=self._plain.mean_s,
            trace=TRACE if self._is_traced else None,
        )


def step_profile(config: Config, data: CaptionDataModule, folder: Path) -> StepProfile | None:
    """The callback that times steps, and the training data told to say how long reading takes; None where nobody asked."""
    if not config.callbacks.profile.enabled:
        return None

    profile = StepProfile(config.callbacks.profile, folder / "profile")
    data.make_dataset = profile.watching(data.make_dataset, data.clips["train"])
    return profile
