"""Training from start to end: stops by a signal, and smaller micro-batches or advice where memory runs out."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from vlmcap.config import Config
from vlmcap.errors import OutOfMemoryError, first_line, is_out_of_memory
from vlmcap.planning.changes import advice
from vlmcap.training.objects import Run, build_run
from vlmcap.training.summary import show_start

if TYPE_CHECKING:
    import lightning as L
    from torch import Tensor

    from vlmcap.assembly.model import Assembly
    from vlmcap.training.callbacks.stopping import Trial
    from vlmcap.types import Clip

FIRST_STEPS = 20  # optimiser steps, after which starting again would waste more than it saves


def fit(
    config: Config,
    assembly: Assembly,
    clips: Mapping[str, Sequence[Clip]],
    folder: Path,
    resumed: Path | None,
    step: int | None,
    trial: Trial | None,
) -> tuple[Config, Run]:
    """Trains; starts again with smaller micro-batches where memory runs out and `trainer.shrink_on_oom=true`.

    Args:
        config: Run configuration.
        assembly: The model, whose trained weights are reset before another start.
        clips: Split name to clips.
        folder: Run folder.
        resumed: Checkpoint to resume from.
        step: Step of that checkpoint.
        trial: The search's view of the run.

    Returns:
        The configuration that fitted into memory, and the run.

    Raises:
        OutOfMemoryError: Memory ran out; the sentence says what would help.
    """
    run = build_run(config, assembly, clips, folder, step, trial)
    first = _trained_weights(run) if config.trainer.shrink_on_oom else {}
    show_start(config, run, assembly)
    while (error := _fit_once(run, resumed)) is not None:
        smaller = smaller_batches(config) if _may_shrink(config, run, resumed) else None
        if smaller is None:
            raise OutOfMemoryError(f"memory ran out at step {run.trainer.global_step + 1} ({error}): {advice(config)}")
        print(
            f"Memory ran out at step {run.trainer.global_step + 1}: starting again with "
            f"data.batch_size={smaller.data.batch_size} "
            f"trainer.accumulate_grad_batches={smaller.trainer.accumulate_grad_batches}, the same clips in each "
            "optimiser step.",
            flush=True,
        )
        config = smaller
        del run  # and the optimiser's state with it
        release_memory()
        run = build_run(config, assembly, clips, folder, step, trial)
        _reset(run, first)
    return config, run


def smaller_batches(config: Config) -> Config | None:
    """The same clips in each optimiser step, in smaller micro-batches; None for those of one clip."""
    size = config.data.batch_size
    factor = next(
        (factor for factor in range(2, size + 1) if size % factor == 0), None
    )  # a half, or less where that is no whole number
    if factor is None or config.data.max_tokens_per_batch is not None:
        return None
    accumulated = config.trainer.accumulate_grad_batches * factor
    # Batches of one clip can shrink no further, so the setting is refused beside them.
    trainer = replace(config.trainer, accumulate_grad_batches=accumulated, shrink_on_oom=size > factor)
    return replace(config, data=replace(config.data, batch_size=size // factor), trainer=trainer)


def _may_shrink(config: Config, run: Run, resumed: Path | None) -> bool:
    is_early = resumed is None and run.trainer.global_step < FIRST_STEPS
    return config.trainer.shrink_on_oom and is_early and run.trainer.world_size == 1


def _fit_once(run: Run, resumed: Path | None) -> str | None:
    """Trains; what the allocator said where memory ran out.

    The exception itself is not kept, as it holds all that it came through.
    """
    try:
        with run.data.watch.naming_clips(), listening(run), keeping_interrupts(run.trainer):
            run.trainer.fit(run.module, datamodule=run.data, ckpt_path=resumed, weights_only=True)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return first_line(error)
    return None


@contextmanager
def keeping_interrupts(trainer: L.Trainer) -> Iterator[None]:
    """Within it, Ctrl-C stays a KeyboardInterrupt, of which Lightning makes a SystemExit."""
    try:
        yield
    except SystemExit as error:
        if trainer.interrupted:
            raise KeyboardInterrupt from error
        raise


def listening(run: Run) -> AbstractContextManager[None]:
    """Within it, signals end the run with its state saved."""
    from vlmcap.training.callbacks.requeue import StopOnSignal

    stop = next(callback for callback in run.trainer.callbacks if isinstance(callback, StopOnSignal))  # type: ignore[attr-defined]
    return stop.listening()


def _trained_weights(run: Run) -> dict[str, Tensor]:
    """Copies in host memory of what training changes."""
    return {
        name: weight.detach().to("cpu", copy=True)
        for part in run.module.trained.values()
        for name, weight in part.items()
    }


def _reset(run: Run, weights: dict[str, Tensor]) -> None:
    for part in run.module.trained.values():
        for name, weight in part.items():
            weight.data.copy_(weights[name])
            weight.grad = None


def release_memory() -> None:
    """Frees what an earlier run of this process left, and resets the peak memory of the device.

    A CPU has none to reset.
    """
    import torch

    gc.collect()  # models hold themselves in circles
    if torch.cuda.is_initialized():  # asking for it would take memory of a GPU that a run on the CPU does not use
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
