"""The folder that `vlmcap export` writes: what stands where, and how it is read as a checkpoint again.

Beside the model's own files there is a folder `vlmcap/` with what the model's class does not know. It is a folder because vLLM reads every
`*.safetensors` beside config.json as weights of the model.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmcap.compose import to_plain, write_yaml
from vlmcap.config import Config, Quantization
from vlmcap.errors import UserError, first_line

if TYPE_CHECKING:
    from torch import Tensor

_FOLDER, _CONFIG, _ORIGIN = "vlmcap", "config.yaml", "origin.json"
_PARTS = ("projector", "encoder")  # a file each, the second only where the encoder was trained


def as_exported(config: Config, folder: Path) -> Config:
    """The run's configuration on the exported model: its adapters are in the weights, and nothing more is trained of the language model.

    Args:
        config: Of the run.
        folder: Of the exported model, which takes the place of the base.
    """
    part = "model" if config.is_whole else "llm"
    stages = {name: dataclasses.replace(stage, adapter_lr=0.0, llm_lr=0.0) for name, stage in config.tuning.stages.items()}
    changed = dataclasses.replace(
        config,
        tuning=dataclasses.replace(config.tuning, stages=stages, use_lora=False),
        llm=dataclasses.replace(config.llm, quantization=Quantization["none"]),
    )
    base = dataclasses.replace(getattr(changed, part), checkpoint=str(folder), revision=None)
    return dataclasses.replace(changed, **{part: base})


def write_parts(folder: Path, config: Config, weights: Mapping[str, Tensor], origin: Mapping[str, Any]) -> None:
    """Writes projector, trained encoder weights, configuration and origin into a new folder of an export.

    Args:
        folder: With the model's own files.
        config: Of the run.
        weights: The checkpoint's state.
        origin: Plain data that says where the weights come from.
    """
    from safetensors.torch import save_file

    beside = folder / _FOLDER
    beside.mkdir()
    for part in _PARTS:
        prefix = f"captioner.{part}."
        own = {name.removeprefix(prefix): tensor.contiguous() for name, tensor in weights.items() if name.startswith(prefix)}
        if own:
            save_file(own, beside / f"{part}.safetensors")
    write_yaml(to_plain(as_exported(config, Path("."))), beside / _CONFIG)
    (beside / _ORIGIN).write_text(json.dumps(origin, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def is_export(path: Path) -> bool:
    """Whether `vlmcap export` wrote this folder."""
    return (path / _FOLDER / _CONFIG).is_file()


def read_origin(folder: Path) -> dict[str, Any]:
    """Where the weights of an export come from."""
    origin: dict[str, Any] = json.loads((folder / _FOLDER / _ORIGIN).read_text(encoding="utf-8"))
    return origin


def read_export(folder: Path) -> dict[str, Any]:
    """An exported folder as `read_checkpoint` gives a checkpoint: plain data, and the tensors that are not in the model.

    Raises:
        UserError: Its files cannot be read.
    """
    from omegaconf import OmegaConf
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    beside = folder / _FOLDER
    weights: dict[str, Tensor] = {}
    try:
        for part in _PARTS:
            file = beside / f"{part}.safetensors"
            weights |= {f"captioner.{part}.{name}": tensor for name, tensor in load_file(file).items()} if file.is_file() else {}
        plain: Any = OmegaConf.to_container(OmegaConf.load(beside / _CONFIG))
        origin = read_origin(folder)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{beside} cannot be read ({first_line(error)}); run `vlmcap export` again") from error
    plain["llm" if plain["model"]["kind"] == "assembled" else "model"]["checkpoint"] = str(folder.resolve())
    bases = {part: base for part, base in origin["bases"].items() if part == "encoder"}  # the other one is this folder
    return {"state_dict": weights, "vlmcap": {"config": plain, "bases": bases}}
