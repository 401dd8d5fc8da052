"""The batch of an optimiser step, kept small while it trains and written down where it went wrong."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from vlmcap.files import replacing
from vlmcap.types import Clip


@dataclass(slots=True)
class MicroBatch:
    """What a loss was computed of, without frames and features: the clips' files have those.

    Attributes:
        clips: In the order of rows.
        input_ids: int64 (R, S).
        labels: int64 (R, S), or None.
        attention_mask: int64 (R, S).
        loss: Summed, in nats.
        num_labels: Tokens that the sum is over.
    """

    clips: tuple[Clip, ...]
    input_ids: Tensor
    labels: Tensor | None
    attention_mask: Tensor
    loss: float = 0.0
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
        return sum(batch.loss for batch in self.batches) / max(1, sum(batch.num_labels for batch in self.batches))


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
                "loss": _plain(batch.loss / max(1, batch.num_labels)),
                "label_tokens": batch.num_labels,
                "shape": list(batch.input_ids.shape),
                "clips": [{"id": clip.id, "video": clip.video, "captions": list(clip.captions)} for clip in batch.clips],
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
