"""Training from start to end: signals heard, and an answer where memory does not do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from vlmcap.config import Config
from vlmcap.errors import OutOfMemoryError, first_line, is_out_of_memory
from vlmcap.planning.changes import advice
from vlmcap.training.console import show_start
from vlmcap.training.summary import release_memory

if TYPE_CHECKING:
    from torch import Tensor

    from vlmcap.assembly.model import Assembly
    from vlmcap.training.objects import Run

FIRST_STEPS = 20  # optimiser steps, after which starting again would waste more than it saves


def fit(
    config: Config, assembly: Assembly, start: Callable[[Config], Run], resumed: Path | None
) -> tuple[Config, Run, dict[str, dict[str, int]]]:
    """Trains, again with smaller micro-batches where memory runs out and `trainer.shrink_on_oom=true`.

    Args:
        config: Of the run.
        assembly: The model, whose trained weights are set back for another start.
        start: Makes the objects of a run anew.
        resumed: Checkpoint to go on from.

    Returns:
        The configuration that did, the run, and the counts of its parameters.

    Raises:
        OutOfMemoryError: Memory ran out, with what would help.
    """
    run = start(config)
    first = _trained_weights(run) if config.trainer.shrink_on_oom else {}
    parts = show_start(config, run, assembly)
    while (error := _fit_once(run, resumed)) is not None:
        smaller = smaller_batches(config) if _may_shrink(config, run, resumed) else None
        if smaller is None:
            raise OutOfMemoryError(f"memory ran out at step {run.trainer.global_step + 1} ({error}): {advice(config)}")
        print(
            f"Memory ran out at step {run.trainer.global_step + 1}: starting again with data.batch_size={smaller.data.batch_size} "
            f"trainer.accumulate_grad_batches={smaller.trainer.accumulate_grad_batches}, the same clips in each optimiser step.",
            flush=True,
        )
        config = smaller
        del run
        release_memory()
        run = start(config)
        _set_back(run, first)
    return config, run, parts


def smaller_batches(config: Config) -> Config | None:
    """The same clips in each optimiser step, in smaller micro-batches; None for those of one clip."""
    size = config.data.batch_size
    factor = next((factor for factor in range(2, size + 1) if size % factor == 0), None)  # a half, or less where that is no whole number
    if factor is None or config.data.max_tokens_per_batch is not None:
        return None
    return replace(
        config,
        data=replace(config.data, batch_size=size // factor),
        trainer=replace(config.trainer, accumulate_grad_batches=config.trainer.accumulate_grad_batches * factor),
    )


def _may_shrink(config: Config, run: Run, resumed: Path | None) -> bool:
    is_early = resumed is None and run.trainer.global_step < FIRST_STEPS
    return config.trainer.shrink_on_oom and is_early and run.trainer.world_size == 1


def _fit_once(run: Run, resumed: Path | None) -> str | None:
    """Trains; what the allocator said where memory ran out. The exception itself is not kept, as it holds all that it came through."""
    from vlmcap.training.callbacks.requeue import StopOnSignal

    stop = next(callback for callback in run.trainer.callbacks if isinstance(callback, StopOnSignal))  # type: ignore[attr-defined]
    try:
        with run.data.watch.naming_clips(), stop.listening():
            run.trainer.fit(run.module, datamodule=run.data, ckpt_path=resumed, weights_only=True)
    except SystemExit as error:
        if run.trainer.interrupted:  # what Lightning makes of Ctrl-C
            raise KeyboardInterrupt from error
        raise
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return first_line(error)
    return None


def _trained_weights(run: Run) -> dict[str, Tensor]:
    """Copies in host memory of what training changes."""
    return {name: weight.detach().to("cpu", copy=True) for part in run.module.trained.values() for name, weight in part.items()}


def _set_back(run: Run, weights: dict[str, Tensor]) -> None:
    for part in run.module.trained.values():
        for name, weight in part.items():
            weight.data.copy_(weights[name])
            weight.grad = None
