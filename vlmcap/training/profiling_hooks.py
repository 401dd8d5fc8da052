"""Hooks that tell where inside a forward pass a step is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from vlmcap.models.captioner import VideoCaptioner
from vlmcap.models.llm.adapt import base_model
from vlmcap.training.profiling_clock import Recorder


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
