"""The end of a run that has gone wrong: a loss or gradient that is no number, or a loss that ran off.

The batch of each optimiser step is kept small while it trains, and written down where the step went wrong.
"""

from __future__ import annotations

import json
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
from vlmcap.files import replacing
from vlmcap.training.module import CaptioningModule
from vlmcap.training.random_state import random_states
from vlmcap.types import Batch, Clip

_SMOOTHED = 10  # steps whose mean is the loss that the best one is sought of
_LEAST_RISE = 1.0  # nats a token; a loss of 0.01 may well double


@dataclass(slots=True)
class MicroBatch:
    """What a loss was computed of, without frames and features: the clips' files have those.

    Attributes:
        clips: In the order of rows.
        input_ids: int64 (R, S).
        labels: int64 (R, S), or None.
        attention_mask: int64 (R, S).
        loss: Summed, in nats; on the device until it is looked at.
        num_labels: Tokens that the sum is over.
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
        step: Optimiser steps before it.
        epoch: From 0.
        stage: Its name.
        rates: Part to learning rate.
        random: Every generator's state in front of its first micro-batch, as `random_states` has it.
        batches: So far.
        grad_norm: Before clipping, on the device.
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
        """Nats a label token."""
        return sum(float(batch.loss) for batch in self.batches) / max(
            1, sum(batch.num_labels for batch in self.batches)
        )


class DivergenceGuard(L.Callback):
    """Watches the loss of each micro-batch, for which the host waits once per step, and the gradients.

    A loss is looked at before the optimiser's step. The norm of the gradients is read with the next step's loss, when
    it has long been computed, and before anything is saved: a step with a wrong gradient has then spoiled the weights,
    but no checkpoint.

    Args:
        config: Factor, window and skips.
        folder: Of the run; the batch goes to `diverged/` in it.
        is_scaled: The run is in float16, whose scaler skips steps with wrong gradients.
    """

    def __init__(self, config: GuardConfig, folder: Path, *, is_scaled: bool) -> None:
        self.config, self.folder, self.is_scaled = config, folder, is_scaled
        self._window: Window | None = None
        self._stepped: Window | None = None  # of the last step, whose norm has not been looked at
        self._recent: deque[float] = deque(maxlen=_SMOOTHED)
        self._best, self._high, self._skips = math.inf, 0, 0

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        """Notes what the loss is going to be computed of."""
        assert isinstance(pl_module, CaptioningModule)
        if self._window is None:
            position = pl_module.plan.at_epoch(trainer.current_epoch)
            rates = {group["part"]: float(group["lr"]) for group in pl_module.rate_groups()}
            self._window = Window(trainer.global_step, trainer.current_epoch, position.name, rates, random_states())
        self._window.batches.append(MicroBatch(batch.clips, batch.input_ids, batch.labels, batch.attention_mask))

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: torch.Tensor) -> None:
        """Keeps the loss of `training_step`."""
        assert isinstance(pl_module, CaptioningModule) and self._window is not None
        self._window.batches[-1].loss, self._window.batches[-1].num_labels = pl_module.last_loss

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Looks at the step before, then at this one's loss.

        Raises:
            DivergedError: One of them is wrong.
        """
        assert isinstance(pl_module, CaptioningModule) and self._window is not None
        self.settle(trainer)
        window = self._window
        reason = self._judge(window)
        if (
            trainer.strategy.reduce_boolean_decision(reason is not None, all=False)
            if trainer.world_size > 1
            else reason
        ):
            self._stop(trainer, window, reason or "the loss of another process went wrong")

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Ends the window after an optimiser step."""
        assert isinstance(pl_module, CaptioningModule) and self._window is not None
        if pl_module.grad_norm is not None:
            self._window.grad_norm, pl_module.grad_norm = pl_module.grad_norm, None
            self._stepped, self._window = self._window, None

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Looks at the last step before minutes go into captions."""
        self.settle(trainer)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Looks at the last step before it goes into a file, and counts it there, as Lightning has taken the state already."""
        self.settle(trainer)
        checkpoint["callbacks"][self.state_key] = self.state_dict()

    def settle(self, trainer: L.Trainer) -> None:
        """Looks at the gradients of the last step.

        Raises:
            DivergedError: They are no numbers, and no scaler has skipped the step.
        """
        window, self._stepped = self._stepped, None
        if window is None:
            return
        norm = float(window.grad_norm) if window.grad_norm is not None else 0.0
        if math.isfinite(norm):
            self._skips = 0
            return
        self._skips += 1
        if not self.is_scaled:
            self._stop(trainer, window, f"the norm of the gradients is {norm}")
        if self._skips >= self.config.fp16_skips:
            self._stop(trainer, window, f"the gradients of {self._skips} steps in a row overflow in float16")

    def _judge(self, window: Window) -> str | None:
        """What is wrong with the loss of a step, if anything; under a scaler its gradients say it."""
        loss = window.loss
        if not any(batch.num_labels for batch in window.batches):  # none of its clips could be read
            return None
        if not math.isfinite(loss):
            return None if self.is_scaled else f"the loss is {loss}"
        is_high = loss > max(self.config.factor * self._best, self._best + _LEAST_RISE)
        self._high = self._high + 1 if is_high else 0
        self._recent.append(loss)
        if len(self._recent) == _SMOOTHED:
            self._best = min(self._best, sum(self._recent) / _SMOOTHED)
        if self._high < self.config.window:
            return None
        return f"the loss, {loss:.3g}, has been far above its best, {self._best:.3g}, for {self._high} steps"

    def _stop(self, trainer: L.Trainer, window: Window, reason: str) -> None:
        name = f"step-{window.step + 1:06d}" + (f"-rank-{trainer.global_rank}" if trainer.world_size > 1 else "")
        target = self.folder / "diverged" / name
        write_window(window, reason, target, precision=str(trainer.precision))
        last = self.folder / "checkpoints" / "last.ckpt"
        saved = "last.ckpt is of before" if last.is_file() else "no checkpoint was saved yet"
        mend = "optim.max_grad_norm=0.3, a longer warm-up (tuning.warmup_ratio) or half the learning rates"
        if self.is_scaled:
            mend = "a GPU with bfloat16 (hardware.precision=bf16), or " + mend
        raise DivergedError(
            f"stopped at step {window.step + 1} ({window.stage}, epoch {window.epoch + 1}): {reason}; its batch is in "
            f"{target}.json, "
            f"{saved}; look at those clips, then try {mend}, or turn this check off by callbacks.guard.enabled=false"
        )

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        return {"recent": list(self._recent), "best": self._best, "high": self._high, "skips": self._skips}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As saved."""
        self._recent.extend(state_dict["recent"])
        self._best, self._high, self._skips = state_dict["best"], state_dict["high"], state_dict["skips"]


def write_window(window: Window, reason: str, target: Path, *, precision: str) -> None:
    """`<target>.json` and `<target>.safetensors`: what to look at, and the tensors to do the step again.

    Args:
        window: Of the step.
        reason: Why it is written.
        target: Without suffix.
        precision: Of the run, as Lightning calls it.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    tensors = {f"random.cuda.{index}": state for index, state in enumerate(window.random["cuda"])}
    tensors |= {"random.torch": window.random["torch"], "random.numpy": window.random["numpy"][1]}
    for index, batch in enumerate(window.batches):
        named = {"input_ids": batch.input_ids, "labels": batch.labels, "attention_mask": batch.attention_mask}
        tensors |= {f"batch.{index}.{name}": value for name, value in named.items() if value is not None}
    generator = window.random["numpy"]
    content = {
        "reason": reason,
        "step": window.step + 1,
        "epoch": window.epoch + 1,
        "stage": window.stage,
        "loss": _plain(window.loss),
        "grad_norm": None if window.grad_norm is None else _plain(float(window.grad_norm)),
        "rates": window.rates,
        "precision": precision,
        "batches": [
            {
                "loss": _plain(float(batch.loss) / max(1, batch.num_labels)),
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
    with replacing(target.with_suffix(".safetensors")) as partial:
        save_file({name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}, partial)
    with replacing(target.with_suffix(".json")) as partial:
        partial.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def _plain(value: float) -> float | str:
    """A number that JSON knows, or its name."""
    return value if math.isfinite(value) else str(value)
