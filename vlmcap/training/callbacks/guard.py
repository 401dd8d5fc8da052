"""Stops a run that diverges: on a loss or gradient that is not finite, or on a loss far above its best value.

The guard keeps a small record of the batch of each optimiser step, and writes it to a file if the step diverges.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import torch
from safetensors.torch import save_file
from torch import Tensor

from vlmcap.config import GuardConfig
from vlmcap.errors import DivergedError
from vlmcap.files import replacing, write_json
from vlmcap.training.module import CaptioningModule
from vlmcap.training.random_state import random_states
from vlmcap.types import Batch, Clip

_SMOOTHING_STEPS = 10  # steps that are averaged before a loss counts as the best one
_MIN_RISE = 1.0  # nats per token above the best loss; a loss of 0.01 may double without harm


@dataclass(slots=True)
class MicroBatch:
    """A micro-batch and its loss, without frames and features, which can be read from the files of the clips.

    Attributes:
        clips: Clips in the order of the batch.
        input_ids: Token ids, int64 (R, S) with R rows of length S.
        labels: Labels, int64 (R, S), or None.
        attention_mask: Attention mask, int64 (R, S).
        loss: Loss in nats, summed over label tokens; on the device until it is checked.
        num_labels: Number of label tokens.
    """

    clips: tuple[Clip, ...]
    input_ids: Tensor
    labels: Tensor | None
    attention_mask: Tensor
    loss: float | Tensor = 0.0
    num_labels: int = 0


@dataclass(slots=True)
class Window:
    """The micro-batches of one optimiser step.

    Attributes:
        step: Number of earlier optimiser steps.
        epoch: Epoch, from 0.
        stage: Name of the stage.
        rates: Learning rate of each component.
        random: Result of `random_states` before the first micro-batch.
        batches: Micro-batches so far.
        grad_norm: Gradient norm before clipping, on the device.
    """

    step: int
    epoch: int
    stage: str
    rates: dict[str, float]
    random: dict[str, Any]
    batches: list[MicroBatch] = field(default_factory=list)
    grad_norm: Tensor | None = None

    @property
    def loss(self) -> float:
        """Mean loss in nats per label token."""
        return sum(float(batch.loss) for batch in self.batches) / max(
            1, sum(batch.num_labels for batch in self.batches)
        )


class DivergenceGuard(L.Callback):
    """Stops a run whose loss or gradients diverge.

    The loss is checked before the optimiser step, which makes the host wait for the device once per step. The gradient
    norm is checked together with the loss of the next step, when it has long been computed, and before every save: a
    step with a bad gradient may spoil the weights in memory, but no checkpoint.

    Args:
        config: Thresholds of the guard.
        folder: Run folder; the batch is written to its subfolder `diverged/`.
        is_scaled: Whether the run uses float16, whose scaler skips steps with overflowing gradients.
    """

    def __init__(self, config: GuardConfig, folder: Path, *, is_scaled: bool) -> None:
        self.config, self.folder, self.is_scaled = config, folder, is_scaled
        self._window: Window | None = None
        self._stepped: Window | None = None  # the last step, whose gradient norm is not checked yet
        self._recent: deque[float] = deque(maxlen=_SMOOTHING_STEPS)
        self._best, self._high, self._skips = math.inf, 0, 0

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        """Records the micro-batch before its loss is computed."""
        assert isinstance(pl_module, CaptioningModule)
        # A window opens with the first micro-batch of an optimiser step, and so keeps the random states that repeat it.
        if self._window is None:
            position = pl_module.plan.at_epoch(trainer.current_epoch)
            rates = {group["component"]: float(group["lr"]) for group in pl_module.rate_groups()}
            self._window = Window(trainer.global_step, trainer.current_epoch, position.name, rates, random_states())
        # Frames and features stay out, because they take gigabytes; tokens and masks stay on the device.
        self._window.batches.append(MicroBatch(batch.clips, batch.input_ids, batch.labels, batch.attention_mask))

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: torch.Tensor) -> None:
        """Records the loss of `training_step`."""
        assert isinstance(pl_module, CaptioningModule) and self._window is not None
        self._window.batches[-1].loss, self._window.batches[-1].num_labels = pl_module.last_loss

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Checks the gradients of the previous step, then the loss of this step.

        Raises:
            DivergedError: One of them has diverged.
        """
        assert isinstance(pl_module, CaptioningModule) and self._window is not None
        self.check_last_step(trainer)
        window = self._window
        reason = self._loss_problem(window)
        # All ranks must stop together, as the others would wait for this one in the next collective operation.
        has_diverged = reason is not None
        if trainer.world_size > 1:
            has_diverged = trainer.strategy.reduce_boolean_decision(has_diverged, all=False)
        if has_diverged:
            self._stop(trainer, window, reason or "the loss of another process has diverged")

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Closes the window after an optimiser step."""
        assert isinstance(pl_module, CaptioningModule) and self._window is not None
        # The norm exists only after an optimiser step; it is taken, so that it is not seen twice.
        if pl_module.grad_norm is not None:
            self._window.grad_norm, pl_module.grad_norm = pl_module.grad_norm, None
            self._stepped, self._window = self._window, None

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Checks the last step before validation, which may take minutes."""
        self.check_last_step(trainer)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Checks the last step before it is saved."""
        self.check_last_step(trainer)
        # Lightning has collected the callback states already, without the step that was just checked.
        checkpoint["callbacks"][self.state_key] = self.state_dict()

    def check_last_step(self, trainer: L.Trainer) -> None:
        """Checks the gradients of the last step.

        Raises:
            DivergedError: They are not finite and no scaler has skipped the step, or too many steps were skipped.
        """
        window, self._stepped = self._stepped, None
        if window is None:
            return
        norm = float(window.grad_norm) if window.grad_norm is not None else 0.0
        if math.isfinite(norm):
            self._skips = 0
            return
        # The float16 scaler skips a step that overflows and lowers its scale, which is normal at the start.
        self._skips += 1
        if not self.is_scaled:
            self._stop(trainer, window, f"the norm of the gradients is {norm}")
        if self._skips >= self.config.fp16_skips:
            self._stop(trainer, window, f"the gradients of {self._skips} steps in a row overflow in float16")

    def _loss_problem(self, window: Window) -> str | None:
        """Returns what is wrong with the loss of a step, or None; with a scaler, the gradients are checked instead."""
        loss = window.loss
        if not any(batch.num_labels for batch in window.batches):  # no clip of the step could be read
            return None
        # The loss of an overflow in float16 is not finite either.
        if not math.isfinite(loss):
            return None if self.is_scaled else f"the loss is {loss}"
        is_high = loss > max(self.config.factor * self._best, self._best + _MIN_RISE)
        self._high = self._high + 1 if is_high else 0
        # The best loss is a mean of several steps, because a single easy batch would set it too low.
        self._recent.append(loss)
        if len(self._recent) == _SMOOTHING_STEPS:
            self._best = min(self._best, sum(self._recent) / _SMOOTHING_STEPS)
        if self._high < self.config.window:
            return None
        return f"the loss, {loss:.3g}, has been far above its best, {self._best:.3g}, for {self._high} steps"

    def _stop(self, trainer: L.Trainer, window: Window, reason: str) -> None:
        # "step-000123-rank-1"
        name = f"step-{window.step + 1:06d}" + (f"-rank-{trainer.global_rank}" if trainer.world_size > 1 else "")
        target = self.folder / "diverged" / name
        write_window(window, reason, target, precision=str(trainer.precision))
        last = self.folder / "checkpoints" / "last.ckpt"
        saved = "last.ckpt is from an earlier step" if last.is_file() else "no checkpoint was saved yet"
        hint = "optim.max_grad_norm=0.3, a longer warm-up (tuning.warmup_ratio) or half the learning rates"
        if self.is_scaled:
            hint = "a GPU with bfloat16 (hardware.precision=bf16), or " + hint
        raise DivergedError(
            f"stopped at step {window.step + 1} ({window.stage}, epoch {window.epoch + 1}): {reason}; its batch is in "
            f"{target}.json, and {saved}; look at those clips, then try {hint}, or turn this check off with "
            "callbacks.guard.enabled=false"
        )

    def state_dict(self) -> dict[str, Any]:
        """Returns plain numbers."""
        return {"recent": list(self._recent), "best": self._best, "high": self._high, "skips": self._skips}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the result of `state_dict`."""
        self._recent.extend(state_dict["recent"])
        self._best, self._high, self._skips = state_dict["best"], state_dict["high"], state_dict["skips"]


def write_window(window: Window, reason: str, target: Path, *, precision: str) -> None:
    """Writes `<target>.json`, a description of the step, and `<target>.safetensors`, the tensors to repeat it.

    Args:
        window: Micro-batches of the step.
        reason: Why the run stopped.
        target: Path without suffix.
        precision: Lightning's name of the precision.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    tensors = {f"random.cuda.{index}": state for index, state in enumerate(window.random["cuda"])}
    # Random states are bytes and 64-bit integers, which safetensors stores exactly.
    tensors |= {"random.torch": window.random["torch"], "random.numpy": window.random["numpy"][1]}
    for index, batch in enumerate(window.batches):
        named = {"input_ids": batch.input_ids, "labels": batch.labels, "attention_mask": batch.attention_mask}
        tensors |= {f"batch.{index}.{name}": value for name, value in named.items() if value is not None}
    # NumPy's state is a tuple; its second element, 624 words, is among the tensors.
    generator = window.random["numpy"]
    content = {
        "reason": reason,
        "step": window.step + 1,
        "epoch": window.epoch + 1,
        "stage": window.stage,
        "loss": _as_json(window.loss),
        "grad_norm": None if window.grad_norm is None else _as_json(float(window.grad_norm)),
        "rates": window.rates,
        "precision": precision,
        "batches": [
            {
                "loss": _as_json(float(batch.loss) / max(1, batch.num_labels)),
                "label_tokens": batch.num_labels,
                "shape": list(batch.input_ids.shape),
                "clips": [
                    {"id": clip.id, "video": clip.video, "captions": list(clip.captions)} for clip in batch.clips
                ],
            }
            for batch in window.batches
        ],
        "random": {"python": window.random["python"], "numpy": [generator[0], *generator[2:]]},
    }
    # The JSON file is written last, so that where it exists, the tensors do too.
    with replacing(target.with_suffix(".safetensors")) as partial:
        # safetensors refuses tensors that share memory.
        save_file({name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}, partial)
    write_json(target.with_suffix(".json"), content)


def _as_json(value: float) -> float | str:
    """Returns a finite number as it is, and any other as text, because JSON has no NaN and no infinity."""
    return value if math.isfinite(value) else str(value)
