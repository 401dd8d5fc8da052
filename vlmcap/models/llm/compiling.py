"""The language model's layers as compiled code."""

from __future__ import annotations

from typing import Any

from torch import nn

from vlmcap.models.llm.adapt import base_model


def compile_layers(llm: nn.Module, backend: str = "inductor") -> None:
    """Compiles each decoder layer by itself, so that all share one piece of code and names in checkpoints stay.

    Lengths are symbolic: captions differ in length from batch to batch, and each new one would be compiled again.

    Args:
        llm: A model of transformers, with or without adapters, changed in place.
        backend: Of `torch.compile`; "inductor" writes C++ or Triton and needs their compiler.
    """
    inner: Any = base_model(llm).model
    for layer in getattr(inner, "language_model", inner).layers:  # Qwen-VL's classes hold the tower beside it
        layer.compile(backend=backend, dynamic=True)
