"""Initialises a projector with trained weights from a run, or from a LLaVA or InternVL checkpoint."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from vlmcap.errors import UserError
from vlmcap.models.checkpoint import read_safetensors
from vlmcap.models.projectors.projector import Projector

_NATIVE_PREFIX = "captioner.projector."
_HF_PREFIX = "multi_modal_projector."
_HF_MODULES = {"layer_norm": "projection.norm", "linear_1": "projection.layers.0", "linear_2": "projection.layers.2"}
# The layer that reads the tokens: of the perceiver, of MLPs, and of cross-attention.
_FIRST = ("projection.enter.weight", "projection.layers.0.weight", "projection.layers.0.attention.key_value.weight")
_OR_TRAIN_NEW = "or set projector.checkpoint=null to train a new projector"


def load_projector_weights(projector: Projector, path: str | Path) -> None:
    """Replaces all weights of a projector by saved ones.

    Args:
        projector: Projector from `build_projector`.
        path: A .ckpt file of a vlmcap run, or a folder in Hugging Face layout with a `multi_modal_projector` (LLaVA,
            InternVL), of which only the files with the projector are read.

    Raises:
        UserError: The path holds no projector, or one that does not fit.
    """
    path = Path(path).expanduser()
    saved = _read_folder(path) if path.is_dir() else _read_run(path)
    present = projector.state_dict()
    _check_widths(path, saved, present)
    _check_names(path, saved, present)
    for name, weight in present.items():
        if saved[name].shape != weight.shape:
            raise UserError(
                f"projector.checkpoint {path} holds {name} with the shape {tuple(saved[name].shape)}, but this "
                f"projector needs {tuple(weight.shape)}; use the projector, encoder and data.num_frames it was "
                f"trained with, {_OR_TRAIN_NEW}"
            )
    projector.load_state_dict(saved)


def _read_run(path: Path) -> dict[str, Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        weights = content["state_dict"].items()
    except Exception as error:  # each kind of invalid file raises another type
        raise UserError(
            f"projector.checkpoint {path} is neither a .ckpt file of a run nor a folder in Hugging Face layout "
            f"({type(error).__name__}); set it to one of these, {_OR_TRAIN_NEW}"
        ) from error
    prefix = _NATIVE_PREFIX
    return _require_weights({name.removeprefix(prefix): w for name, w in weights if name.startswith(prefix)}, path)


def _read_folder(folder: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError

    try:
        wanted = read_safetensors(folder, lambda name: _native_name(name) is not None)
        weights = {native: tensor for name, tensor in wanted if (native := _native_name(name))}
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"projector.checkpoint {folder} could not be read ({type(error).__name__}); copy the folder again"
        ) from error
    return _require_weights(weights, folder)


def _native_name(name: str) -> str | None:
    """Returns the name in `Projector` for a tensor of a Hugging Face projector; None for any other tensor."""
    # "model.multi_modal_projector.linear_1.weight" -> "projection.layers.0.weight"
    name = name.removeprefix("model.")
    module, _, weight = name.removeprefix(_HF_PREFIX).rpartition(".")
    return f"{_HF_MODULES[module]}.{weight}" if name.startswith(_HF_PREFIX) and module in _HF_MODULES else None


def _require_weights(weights: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    if not weights:
        raise UserError(
            f"projector.checkpoint {path} holds no projector ({_NATIVE_PREFIX}… in a run, {_HF_PREFIX}… in the "
            f"safetensors of a folder); set it to a checkpoint with a projector, {_OR_TRAIN_NEW}"
        )
    return weights


def _check_widths(path: Path, saved: dict[str, Tensor], present: dict[str, Tensor]) -> None:
    """Raises a `UserError` if the last layer is for another language model, or the first one for another encoder."""
    last = [name for name, weight in present.items() if name.startswith("projection.") and weight.dim() == 2][-1]
    if last in saved and len(saved[last]) != len(present[last]):
        raise UserError(
            f"projector.checkpoint {path} is for a language model of width {len(saved[last])}, but llm has width "
            f"{len(present[last])}; set projector.checkpoint=null to train a new projector"
        )
    first = next((name for name in _FIRST if name in present), last)
    if first in saved and saved[first].shape[1] != present[first].shape[1]:
        raise UserError(
            f"projector.checkpoint {path} is for tokens of width {saved[first].shape[1]}, but encoder, "
            f"projector.frame_stack and projector.shuffle give tokens of width {present[first].shape[1]}; use those "
            f"it was trained with, {_OR_TRAIN_NEW}"
        )


def _check_names(path: Path, saved: dict[str, Tensor], present: dict[str, Tensor]) -> None:
    """Raises a `UserError` if one side has a module that the other lacks; it names the key that creates the module."""
    lacking, extra = sorted(present.keys() - saved.keys()), sorted(saved.keys() - present.keys())
    if any(name.startswith("projection.") for name in lacking + extra):
        name = next(name for name in lacking + extra if name.startswith("projection."))
        where = "lacks" if name in lacking else "holds"
        raise UserError(
            f"projector.checkpoint {path} is another kind of projector, as it {where} {name}; "
            f"set projector.kind, depth and use_layer_norm as it was trained, {_OR_TRAIN_NEW}"
        )
    if lacking:
        raise UserError(
            f"projector.checkpoint {path} lacks temporal layers ({lacking[0]}); set projector.temporal=none, "
            f"{_OR_TRAIN_NEW}"
        )
    if extra:
        raise UserError(
            f"projector.checkpoint {path} has temporal layers that this projector lacks ({extra[0]}); "
            f"set projector.temporal as it was trained, {_OR_TRAIN_NEW}"
        )
