"""How the layers of a language model run in training.

Computed again in the backward pass to save memory, or as compiled code.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from vlmcap.models.llm.adapt import base_model


def checkpoint_layers(model: nn.Module, *, is_offloaded: bool = False, num_kept: int = 0) -> None:
    """Keeps of each layer its input alone, in training mode, and computes the rest again on the way back.

    Args:
        model: A model of transformers, changed in place.
        is_offloaded: Inputs wait in pinned host memory: layers × tokens × width less on the device, for a copy there
            and one back.
        num_kept: Last layers that keep all they computed, and are not computed again: the way back reaches them first.
    """
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
    layers: list[Any] = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    assert layers, "transformers marks the modules that it checkpoints"
    for layer in layers[len(layers) - num_kept :]:
        layer.gradient_checkpointing = False
    if is_offloaded:
        for layer in layers:
            layer._gradient_checkpointing_func = _offloading_checkpoint


def _offloading_checkpoint(function: Any, *inputs: Any) -> Any:
    # What the layer saves inside goes to the checkpoint's own hooks, which keep nothing; only the inputs come to these.
    # Masks and positions, which all layers share, are bound to the function and stay where they are.
    with save_on_cpu(pin_memory=torch.cuda.is_available()):
        return checkpoint(function, *inputs, use_reentrant=False)


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
