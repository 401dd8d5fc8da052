"""Measures the seconds of each phase of a step and of an evaluation.

The actions of Lightning's profiler mark the phases of the loop, and hooks mark the components of the model.
"""

from __future__ import annotations

import functools
import re
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch.profilers import Profiler
from torch import nn
from torch.profiler import record_function
from torch.utils.hooks import RemovableHandle

from vlmcap.models.captioner import VideoCaptioner
from vlmcap.models.llm.adapt import base_model
from vlmcap.training.profiling.report import AROUND_LABELS, LABELS

TIMED, TRACED, PLAIN, EVALUATION = "timed", "traced", "plain", "evaluation"
# Phases of each section; the first one collects the time outside of all others.
_SECTIONS: dict[str, tuple[str, ...]] = {
    TIMED: ("other", *LABELS),
    TRACED: ("other", *LABELS),
    PLAIN: ("other",),
    EVALUATION: ("rest", *AROUND_LABELS),
}
_FETCH = "[_TrainingEpochLoop].train_dataloader_next"
_ACTIONS = {  # pattern of Lightning's action names -> phase
    re.escape(_FETCH): "wait",
    r"\[Strategy\].*\.batch_to_device": "transfer",
    r"\[Strategy\].*\.training_step": "other",
    r"\[Strategy\].*\.backward": "backward",
    r"\[LightningModule\].*\.optimizer_zero_grad": "optimiser",
    r"\[LightningModule\].*\.optimizer_step": "optimiser",  # without forward and backward, which run inside it
    r"\[Callback\]CaptionEvaluation\.on_validation_epoch_end": "scores",
}


@functools.cache
def phase_of(action: str) -> str | None:
    """Returns the phase that an action belongs to, or None; the name of a phase is also an action."""
    if action in LABELS or action in AROUND_LABELS:
        return action
    return next((phase for pattern, phase in _ACTIONS.items() if re.fullmatch(pattern, action)), None)


class PhaseProfiler(Profiler):
    """A Lightning profiler that attributes time to the innermost open phase, so that phases add up to the total.

    Only sections, which are steps and evaluations, are measured. In a traced section, each phase is also a span of
    torch's profiler.

    Args:
        on_fetch: Callback before a training batch is fetched, where a step may begin.
        now: Clock in seconds.

    Attributes:
        seconds: Seconds by section and phase, without the phases nested in it.
        wall: Total seconds by section.
        section: The current section, or None.
        device: Device that timed sections synchronise with between phases, because kernels run asynchronously.
    """

    def __init__(self, on_fetch: Callable[[], None], now: Callable[[], float] = time.perf_counter) -> None:
        super().__init__()
        self.seconds: dict[str, defaultdict[str, float]] = {name: defaultdict(float) for name in _SECTIONS}
        self.wall = dict.fromkeys(_SECTIONS, 0.0)
        self.section: str | None = None
        self.device = torch.device("cpu")
        self._on_fetch, self._clock = on_fetch, now
        self._open: list[tuple[str, str, record_function | None]] = []  # action, phase and span, the innermost last
        self._begun = self._last = 0.0

    def begin(self, section: str) -> None:
        """Ends the current section, and begins another one."""
        self.end()
        self.section = section
        self._begun = self._last = self._now()
        # The section itself is the outermost entry: time outside of all phases is charged to its first phase.
        self._open.append((section, _SECTIONS[section][0], self._span("step")))

    def end(self) -> None:
        """Ends the current section, if there is one, with all open phases."""
        # Charge first, as the last phase ends with its section.
        if self.section is not None:
            self._charge()
            self._close(0)
            self.wall[self.section] += self._last - self._begun
            self.section = None

    def start(self, action_name: str) -> None:
        """Opens a phase if the action belongs to one of the current section."""
        if action_name == _FETCH:
            # The fetch of a batch may begin a new step, so the callback comes before the phase is opened.
            self._on_fetch()
        phase = phase_of(action_name)
        # Phases of another section, such as "captions" in a timed step, are not opened.
        if self.section is not None and phase is not None and phase in _SECTIONS[self.section][1:]:
            self._charge()
            self._open.append((action_name, phase, self._span(phase)))

    def stop(self, action_name: str) -> None:
        """Closes an action with all phases nested in it; actions from outside of the section are ignored."""
        # From the innermost phase outwards; index 0 is the section, which only `end` closes.
        for index in range(len(self._open) - 1, 0, -1):
            if self._open[index][0] == action_name:
                self._charge()
                self._close(index)
                break

    def wait_for_device(self) -> None:
        """Waits until the device has finished all queued work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _charge(self) -> None:
        """Adds the time since the last change of phase to the innermost open phase."""
        assert self.section is not None
        now = self._now()
        self.seconds[self.section][self._open[-1][1]] += now - self._last
        self._last = now

    def _now(self) -> float:
        # Kernels run asynchronously; without the wait, their time would count for a later phase.
        if self.section == TIMED:
            self.wait_for_device()
        return self._clock()

    def _span(self, name: str) -> record_function | None:
        return record_function(f"vlmcap: {name}").__enter__() if self.section == TRACED else None

    def _close(self, index: int) -> None:
        """Closes the open phases from an index on."""
        while len(self._open) > index:
            _, _, span = self._open.pop()
            if span is not None:
                span.__exit__(None, None, None)


def hook_modules(captioner: VideoCaptioner, profiler: PhaseProfiler) -> list[RemovableHandle]:
    """Hooks encoder, projector, language model and its head, and returns the handles that remove the hooks.

    The head, and the time between the end of the language model and the end of the training step, count as the loss.
    """
    llm: Any = base_model(captioner.llm)
    hooked: list[tuple[nn.Module | None, str]] = [
        (captioner.encoder, "vision"),
        (captioner.projector, "projector"),
        (llm, "language"),
        (getattr(llm, "lm_head", None), "loss"),
    ]
    handles = []
    for module, phase in hooked:
        if module is not None:
            handles.append(module.register_forward_pre_hook(_hook(profiler.start, phase)))
            handles.append(module.register_forward_hook(_hook(profiler.stop, phase)))
    # After the language model, everything until the end of the action "training_step" counts as loss.
    return [*handles, llm.register_forward_hook(_hook(profiler.start, "loss"))]


def _hook(call: Callable[[str], None], phase: str) -> Callable[..., None]:
    return lambda *_: call(phase)
