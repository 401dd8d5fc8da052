"""Hooks that tell where inside a forward pass a step is."""

from __future__ import annotations

import gzip
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.hooks import RemovableHandle

from vlmcap.files import replacing
from vlmcap.models.captioner import VideoCaptioner
from vlmcap.models.llm.adapt import base_model
from vlmcap.training.profiling.clock import Recorder


def hook_modules(captioner: VideoCaptioner, recorder: Callable[[], Recorder | None]) -> list[RemovableHandle]:
    """Hooks on encoder, projector, language model and its head; to be removed by their handles.

    What comes between the end of the language model and the end of the training step is the loss, and so is the head.

    Args:
        captioner: The model; nothing of it changes.
        recorder: What to tell, if anything, at the time.
    """
    llm: Any = base_model(captioner.llm)
    inner: list[tuple[nn.Module | None, str]] = [
        (captioner.encoder, "vision"),
        (captioner.projector, "projector"),
        (getattr(llm, "lm_head", None), "loss"),
    ]
    handles = []
    for module, part in inner:
        if module is not None:
            handles += [module.register_forward_pre_hook(_enter(recorder, part)), module.register_forward_hook(_leave(recorder))]
    return [*handles, llm.register_forward_pre_hook(_enter(recorder, "language")), llm.register_forward_hook(_end(recorder))]


def _enter(recorder: Callable[[], Recorder | None], part: str) -> Callable[..., None]:
    def hook(*_: object) -> None:
        if (found := recorder()) is not None:
            found.enter(part)

    return hook


def _leave(recorder: Callable[[], Recorder | None]) -> Callable[..., None]:
    def hook(*_: object) -> None:
        if (found := recorder()) is not None:
            found.leave()

    return hook


def _end(recorder: Callable[[], Recorder | None]) -> Callable[..., None]:
    def hook(*_: object) -> None:
        if (found := recorder()) is not None:
            found.leave()
            found.turn("loss")

    return hook


class Trace:
    """Runs from its making to `write` or `drop`."""

    def __init__(self) -> None:
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # or it says on stderr that it starts and stops
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
        self._profile = profile(activities=activities)
        self._profile.start()

    def write(self, path: Path) -> None:
        """Ends, and leaves a gzip file that is whole or not there."""
        self._profile.stop()
        with tempfile.TemporaryDirectory() as folder, replacing(path) as partial:
            raw = Path(folder) / "trace.json"
            self._profile.export_chrome_trace(str(raw))
            with raw.open("rb") as source, gzip.open(partial, "wb", compresslevel=6) as target:
                shutil.copyfileobj(source, target)

    def drop(self) -> None:
        """Ends and leaves nothing."""
        self._profile.stop()
