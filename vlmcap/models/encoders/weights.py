"""The tensors of a vision tower, read out of a checkpoint that may hold much more."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
from torch import Tensor

from vlmcap.errors import UserError, first_line
from vlmcap.models.tensors import holding, read_safetensors, weight_files

Names = Callable[[str], tuple[str, ...]]
"""From a tensor's name in the checkpoint to its names in the tower; several where one tensor holds several, stacked."""


def read_weights(folder: Path, shapes: Mapping[str, torch.Size], names: Names, dtype: torch.dtype) -> dict[str, Tensor]:
    """Every tensor in `shapes` and no other; files that hold none of them are not opened.

    Args:
        folder: Checkpoint in Hugging Face layout, of the tower alone or of a whole model.
        shapes: Of the tower's tensors, by name.
        names: What the checkpoint's names mean.
        dtype: Of what is returned.

    Raises:
        UserError: Weights are missing, unreadable or of another shape; transformers would fill the gaps with random numbers.
    """
    from safetensors import SafetensorError

    weights: dict[str, Tensor] = {}
    try:
        for key, tensor in _read(folder, lambda key: any(name in shapes for name in names(key))):
            targets = names(key)
            parts = tensor.chunk(len(targets))
            weights |= {
                # A part of a larger tensor would keep all of it in memory.
                name: part.to(dtype).clone() if len(targets) > 1 else part.to(dtype)
                for name, part in zip(targets, parts, strict=True)
                if name in shapes
            }
    except UserError:
        raise
    except (OSError, EOFError, ValueError, RuntimeError, SafetensorError, pickle.UnpicklingError) as error:
        raise UserError(
            f"encoder.checkpoint {folder} could not be read ({first_line(error)}); check encoder.family, or copy it again"
        ) from error
    _check(folder, shapes, weights)
    return weights


def _check(folder: Path, shapes: Mapping[str, torch.Size], weights: Mapping[str, Tensor]) -> None:
    missing = sorted(shapes.keys() - weights.keys())
    if missing:
        raise UserError(
            f"encoder.checkpoint {folder} lacks {len(missing)} weights of the vision tower, first: {missing[0]}; "
            "check encoder.family, or take a whole checkpoint"
        )
    for name, shape in shapes.items():
        if weights[name].shape != shape:
            raise UserError(
                f"encoder.checkpoint {folder} has {name} of shape {tuple(weights[name].shape)} where its config.json means "
                f"{tuple(shape)}; take config.json and weights of one checkpoint"
            )


def _read(folder: Path, is_wanted: Callable[[str], bool]) -> Iterator[tuple[str, Tensor]]:
    """Wanted tensors with their names in the checkpoint."""
    if weight_files(folder, "model.safetensors"):
        yield from read_safetensors(folder, is_wanted)
        return
    files = weight_files(folder, "pytorch_model.bin")  # what some older revisions on the hub have alone
    if not files:
        raise FileNotFoundError("it has no model.safetensors")
    for file in holding(files, is_wanted):
        # Files from before torch 1.6 are no zip archives, and only those can be mapped.
        pickled: Any = torch.load(file, map_location="cpu", weights_only=True, mmap=is_zipfile(file))
        yield from ((key, tensor) for key, tensor in pickled.items() if is_wanted(key))
