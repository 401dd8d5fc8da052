"""Gradient checkpointing and compilation of the layers of a language model."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from vlmcap.models.llm.adapt import base_model


def checkpoint_layers(model: nn.Module, *, is_offloaded: bool = False, num_kept: int = 0) -> None:
    """Enables gradient checkpointing: in training, each layer keeps its input only and is recomputed in backward.

    Args:
        model: Model of transformers, modified in place.
        is_offloaded: Whether inputs are kept in pinned host memory, which saves layers × tokens × width on the device
            for a copy in each direction.
        num_kept: Number of last layers that keep all activations and are not recomputed; backward reaches them first.
    """
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
    layers: list[Any] = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    assert layers, "transformers marks the modules that it checkpoints"
    # Backward begins with the last layers, so their activations are freed before earlier layers are recomputed.
    for layer in layers[len(layers) - num_kept :]:
        layer.gradient_checkpointing = False
    if is_offloaded:
        for layer in layers:
            layer._gradient_checkpointing_func = _offloading_checkpoint


def _offloading_checkpoint(function: Any, *inputs: Any) -> Any:
    # Tensors saved inside the layer go to the hooks of `checkpoint`, which keep nothing, so only the inputs reach these
    # hooks. Masks and positions, which all layers share, are bound to the function and stay on the device.
    with save_on_cpu(pin_memory=torch.cuda.is_available()):
        return checkpoint(function, *inputs, use_reentrant=False)


def compile_layers(llm: nn.Module, backend: str = "inductor") -> None:
    """Compiles each decoder layer separately, so that all layers share code and names in checkpoints do not change.

    Lengths are symbolic, because captions differ in length and each new length would be compiled again.

    Args:
        llm: Model of transformers, with or without adapters, modified in place.
        backend: Backend of `torch.compile`; "inductor" generates C++ or Triton and needs a compiler.
    """
    inner: Any = base_model(llm).model
    for layer in getattr(inner, "language_model", inner).layers:  # Qwen-VL nests it
        layer.compile(backend=backend, dynamic=True)
