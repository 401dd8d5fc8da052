"""Runs the fit: handles signals, and retries with smaller micro-batches or gives advice if memory runs out."""

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

MAX_SHRINK_STEP = 20  # optimiser steps; after these, a restart would waste more than it saves


def fit(
    config: Config,
    assembly: Assembly,
    clips: Mapping[str, Sequence[Clip]],
    folder: Path,
    resumed: Path | None,
    step: int | None,
    trial: Trial | None,
) -> tuple[Config, Run]:
    """Trains, and restarts with smaller micro-batches if memory runs out and `trainer.shrink_on_oom=true`.

    Args:
        config: Run configuration.
        assembly: The assembled model; its trained weights are reset before a restart.
        clips: Clips of each split.
        folder: Run folder.
        resumed: Checkpoint to resume from.
        step: Step of that checkpoint.
        trial: Trial of a hyperparameter search.

    Returns:
        The configuration that fits into memory, and the finished run.

    Raises:
        OutOfMemoryError: Memory ran out; the message says which settings would help.
    """
    run = build_run(config, assembly, clips, folder, step, trial)
    # A restart must not begin with weights that the failed attempt has changed already.
    initial_weights = _trained_weights(run) if config.trainer.shrink_on_oom else {}
    show_start(config, run, assembly)
    while (error := _try_fit(run, resumed)) is not None:
        smaller = smaller_batches(config) if _may_shrink(config, run, resumed) else None
        if smaller is None:
            raise OutOfMemoryError(f"memory ran out at step {run.trainer.global_step + 1} ({error}): {advice(config)}")
        print(
            f"Memory ran out at step {run.trainer.global_step + 1}: starting again with "
            f"data.batch_size={smaller.data.batch_size} "
            f"trainer.accumulate_grad_batches={smaller.trainer.accumulate_grad_batches}, so that each optimiser step "
            "sees the same clips.",
            flush=True,
        )
        config = smaller
        # Models stay loaded; only what `build_run` has made is freed.
        del run  # frees the optimiser state
        release_memory()
        run = build_run(config, assembly, clips, folder, step, trial)
        _reset_weights(run, initial_weights)
    return config, run


def smaller_batches(config: Config) -> Config | None:
    """Returns the configuration with smaller micro-batches and the same clips in each optimiser step.

    None if a micro-batch has one clip already, or if batches are sized in tokens.
    """
    size = config.data.batch_size
    # The smallest divisor: half the batch if the size is even.
    factor = next((factor for factor in range(2, size + 1) if size % factor == 0), None)
    # A token budget decides the batch size by itself, so there is no number of clips to divide.
    if factor is None or config.data.max_tokens_per_batch is not None:
        return None
    accumulated = config.trainer.accumulate_grad_batches * factor
    # Batches of one clip cannot shrink, and the configuration refuses the setting for them.
    trainer = replace(config.trainer, accumulate_grad_batches=accumulated, shrink_on_oom=size > factor)
    return replace(config, data=replace(config.data, batch_size=size // factor), trainer=trainer)


def _may_shrink(config: Config, run: Run, resumed: Path | None) -> bool:
    # With several processes, the others would wait for this one in a collective operation.
    is_early = resumed is None and run.trainer.global_step < MAX_SHRINK_STEP
    return config.trainer.shrink_on_oom and is_early and run.trainer.world_size == 1


def _try_fit(run: Run, resumed: Path | None) -> str | None:
    """Trains, and returns the allocator's message if memory ran out.

    The exception itself is dropped, because its traceback would keep the tensors of all frames alive.
    """
    try:
        with run.data.watch.as_user_errors(), handling_signals(run), reraising_interrupts(run.trainer):
            # `weights_only`: checkpoints hold plain data and tensors, and nothing is ever unpickled.
            run.trainer.fit(run.module, datamodule=run.data, ckpt_path=resumed, weights_only=True)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        # A plain string, because the exception's traceback would keep the tensors of the failed step alive.
        return first_line(error)
    return None


@contextmanager
def reraising_interrupts(trainer: L.Trainer) -> Iterator[None]:
    """Turns the SystemExit that Lightning raises at Ctrl-C back into a KeyboardInterrupt."""
    try:
        yield
    except SystemExit as error:
        # Lightning catches KeyboardInterrupt, shuts down and calls `sys.exit(1)`, which would look like a failed run.
        if trainer.interrupted:
            raise KeyboardInterrupt from error
        raise


def handling_signals(run: Run) -> AbstractContextManager[None]:
    """Returns a context in which a signal ends the run after its state is saved."""
    from vlmcap.training.callbacks.requeue import StopOnSignal

    stop = next(callback for callback in run.trainer.callbacks if isinstance(callback, StopOnSignal))  # type: ignore[attr-defined]
    return stop.listening()


def _trained_weights(run: Run) -> dict[str, Tensor]:
    """Returns copies of the trained weights in host memory."""
    return {
        name: weight.detach().to("cpu", copy=True)
        for component in run.module.trained.values()
        for name, weight in component.items()
    }


def _reset_weights(run: Run, weights: dict[str, Tensor]) -> None:
    for component in run.module.trained.values():
        for name, weight in component.items():
            weight.data.copy_(weights[name])
            # Adapters and projector are the same objects in the next attempt.
            weight.grad = None


def release_memory() -> None:
    """Frees the memory of an earlier run of this process, and resets the peak memory counter of the GPU."""
    import torch

    gc.collect()  # models contain reference cycles
    if torch.cuda.is_initialized():  # initialising CUDA would take GPU memory that a CPU run does not need
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
