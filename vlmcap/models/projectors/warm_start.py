"""Weights of a projector that was trained before: one of ours, or that of a LLaVA or InternVL checkpoint."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from vlmcap.errors import UserError
from vlmcap.models.checkpoint import read_safetensors
from vlmcap.models.projectors.projector import Projector

_OURS = "captioner.projector."
_THEIRS = "multi_modal_projector."
_MODULES = {"layer_norm": "projection.norm", "linear_1": "projection.layers.0", "linear_2": "projection.layers.2"}
# The layer that reads the tokens: of the perceiver, of MLPs, and of cross-attention.
_FIRST = ("projection.enter.weight", "projection.layers.0.weight", "projection.layers.0.attention.key_value.weight")
_ANEW = "or set projector.checkpoint=null to train a new projector"


def load_projector_weights(projector: Projector, path: str | Path) -> None:
    """Every weight of the projector replaced by the one in `path`.

    Args:
        projector: As `build_projector` made it.
        path: A .ckpt file of a run here, or a folder in Hugging Face layout that holds a `multi_modal_projector`
            (LLaVA, InternVL); of a folder, only the files with the projector are read.

    Raises:
        UserError: There is no projector in it, or one that does not fit.
    """
    path = Path(path).expanduser()
    saved = _read_folder(path) if path.is_dir() else _read_run(path)
    present = projector.state_dict()
    _check_widths(path, saved, present)
    _check_names(path, saved, present)
    for name, weight in present.items():
        if saved[name].shape != weight.shape:
            raise UserError(
                f"projector.checkpoint {path} holds {name} with the shape {tuple(saved[name].shape)}, here it is "
                f"{tuple(weight.shape)}; "
                f"take the projector, encoder and data.num_frames it was trained with, {_ANEW}"
            )
    projector.load_state_dict(saved)


def _read_run(path: Path) -> dict[str, Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        weights = content["state_dict"].items()
    except Exception as error:  # each kind of wrong file raises another; to the user they are one
        raise UserError(
            f"projector.checkpoint {path} is neither a .ckpt file of a run nor a folder in Hugging Face layout "
            f"({type(error).__name__}); "
            f"name one of these, {_ANEW}"
        ) from error
    return _some({name.removeprefix(_OURS): weight for name, weight in weights if name.startswith(_OURS)}, path)


def _read_folder(folder: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError

    try:
        wanted = read_safetensors(folder, lambda name: _our_name(name) is not None)
        found = {ours: tensor for name, tensor in wanted if (ours := _our_name(name))}
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"projector.checkpoint {folder} could not be read ({type(error).__name__}); copy the folder anew"
        ) from error
    return _some(found, folder)


def _our_name(name: str) -> str | None:
    """Name in our projector of a tensor of theirs; None for any other tensor."""
    name = name.removeprefix("model.")
    module, _, weight = name.removeprefix(_THEIRS).rpartition(".")
    return f"{_MODULES[module]}.{weight}" if name.startswith(_THEIRS) and module in _MODULES else None


def _some(weights: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    if not weights:
        raise UserError(
            f"projector.checkpoint {path} holds no projector ({_OURS}… in a run, {_THEIRS}… in safetensors of a "
            "folder); "
            f"name one that does, {_ANEW}"
        )
    return weights


def _check_widths(path: Path, saved: dict[str, Tensor], present: dict[str, Tensor]) -> None:
    """`UserError` if the layer to Dl is for another language model, or the one from Dv for another encoder."""
    last = [name for name, weight in present.items() if name.startswith("projection.") and weight.dim() == 2][-1]
    if last in saved and len(saved[last]) != len(present[last]):
        raise UserError(
            f"projector.checkpoint {path} is for a language model of width {len(saved[last])}, but llm is "
            f"{len(present[last])} wide; "
            "set projector.checkpoint=null to train a new projector"
        )
    first = next((name for name in _FIRST if name in present), last)
    if first in saved and saved[first].shape[1] != present[first].shape[1]:
        raise UserError(
            f"projector.checkpoint {path} is for tokens of width {saved[first].shape[1]}, but here they have "
            f"{present[first].shape[1]}, "
            f"which encoder, projector.frame_stack and projector.shuffle make; take those it was trained with, {_ANEW}"
        )


def _check_names(path: Path, saved: dict[str, Tensor], present: dict[str, Tensor]) -> None:
    """`UserError` if one side has a part that the other lacks, told by the key that makes the part."""
    lacking, extra = sorted(present.keys() - saved.keys()), sorted(saved.keys() - present.keys())
    if any(name.startswith("projection.") for name in lacking + extra):
        name = next(name for name in lacking + extra if name.startswith("projection."))
        where = "lacks" if name in lacking else "holds"
        raise UserError(
            f"projector.checkpoint {path} is another kind of projector, as it {where} {name}; "
            f"set projector.kind, depth and use_layer_norm as it was trained, {_ANEW}"
        )
    if lacking:
        raise UserError(
            f"projector.checkpoint {path} lacks the part that models time ({lacking[0]}); set "
            f"projector.temporal=none, {_ANEW}"
        )
    if extra:
        raise UserError(
            f"projector.checkpoint {path} models time by a part that this projector lacks ({extra[0]}); "
            f"set projector.temporal as it was trained, {_ANEW}"
        )
