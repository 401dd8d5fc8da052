"""Checkpoints of ours: read safely, checked against a model, and turned back into a captioner, all without Lightning."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmcap.assembly.components import BaseCheckpoints, device_of
from vlmcap.assembly.model import Assembly, assemble, describe_model
from vlmcap.compose import to_plain
from vlmcap.config import Config, Engine, Strategy
from vlmcap.config_saved import saved_config
from vlmcap.errors import UserError, first_line
from vlmcap.libraries import silence_libraries
from vlmcap.planning.make_plan import with_caption_plan
from vlmcap.plugins import check_plugins, plugins_of
from vlmcap.training.schedule import StagePlan

if TYPE_CHECKING:
    from torch import Tensor, nn

    from vlmcap.models.captioner import VideoCaptioner

# An exported folder holds, beside the model's own files, a folder with what the model's class does not know. It is a
# folder because vLLM reads every `*.safetensors` beside config.json as weights of the model.
EXPORT_FOLDER, EXPORT_CONFIG, EXPORT_ORIGIN = "vlmcap", "config.yaml", "origin.json"
EXPORT_PARTS = ("projector", "encoder")  # a file each, the second only where the encoder was trained


def load_captioner(checkpoint: str | Path, overrides: Mapping[str, Any] | None = None) -> VideoCaptioner:
    """A captioner from a checkpoint alone, ready for `caption(paths)`.

    Args:
        checkpoint: File that train.py wrote, or folder that `vlmcap export` wrote.
        overrides: Dotted keys to values, such as {"llm.max_new_tokens": 200}.

    Raises:
        UserError: The checkpoint or one of its bases is missing or is another one.
    """
    silence_libraries()
    content = read_checkpoint(checkpoint)
    config = single_process(saved_config(content["vlmcap"]["config"], overrides))
    if config.evaluation.engine is Engine.vllm:
        raise UserError("evaluation.engine=vllm is for evaluate.py; leave it out here")
    assembly = assemble(describe_model(with_caption_plan(config)), is_fresh=False)
    load_weights(assembly, content, config)
    return assembly.captioner.to(device_of(config)).eval()


def single_process(config: Config) -> Config:
    """The configuration for one process alone: evaluation, captioning and export read any run's checkpoint."""
    hardware = dataclasses.replace(config.hardware, devices=1)
    trainer = dataclasses.replace(config.trainer)
    trainer.strategy, trainer.num_nodes = Strategy.auto, 1
    return dataclasses.replace(config, hardware=hardware, trainer=trainer)


# --- what is in a checkpoint ------------------------------------------------------------------------------------------


def checkpoint_identity(config: Config, sources: BaseCheckpoints) -> dict[str, Any]:
    """What every checkpoint says of itself, as plain data."""
    bases = {part: base.as_dict() for part, base in sources.bases.items()}
    return {"config": to_plain(config), "bases": bases, "plugins": plugins_of(config)}


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """A checkpoint's plain data and tensors; pickled code is refused. A folder of `vlmcap export` is read as one.

    Raises:
        UserError: No such file, not a checkpoint of ours, or one with parts of a plugin that is not loaded.
    """
    import pickle

    import torch

    file = Path(path)
    if is_export(file):
        return read_export(file)
    if not file.is_file():
        folder = file if file.is_dir() else file.parent
        there = sorted(str(found) for found in {*folder.glob("*.ckpt"), *folder.glob("checkpoints/*.ckpt")})
        mend = f"there is {', '.join(there)}" if there else "give a .ckpt file under the checkpoints/ folder of a run"
        raise UserError(f"checkpoint {file} {'is a folder' if file.is_dir() else 'does not exist'}; {mend}")
    try:
        content: Any = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise UserError(f"{file} is no checkpoint that can be read safely: {first_line(error)}") from error
    if not isinstance(content, dict) or "vlmcap" not in content:
        raise UserError(
            f"{file} was not written by vlmcap's train.py; give a .ckpt file under the checkpoints/ folder of a run"
        )
    check_plugins(content["vlmcap"].get("plugins", {}))
    return content


def is_export(path: Path) -> bool:
    """Whether `vlmcap export` wrote this folder."""
    return (path / EXPORT_FOLDER / EXPORT_CONFIG).is_file()


def read_origin(folder: Path) -> dict[str, Any]:
    """Where the weights of an export come from."""
    origin: dict[str, Any] = json.loads((folder / EXPORT_FOLDER / EXPORT_ORIGIN).read_text(encoding="utf-8"))
    return origin


def read_export(folder: Path) -> dict[str, Any]:
    """An exported folder as `read_checkpoint` gives a checkpoint.

    Plain data, and the tensors that are not in the model.

    Raises:
        UserError: Its files cannot be read.
    """
    from omegaconf import OmegaConf
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    beside = folder / EXPORT_FOLDER
    weights: dict[str, Tensor] = {}
    try:
        for part in EXPORT_PARTS:
            file = beside / f"{part}.safetensors"
            weights |= (
                {f"captioner.{part}.{name}": tensor for name, tensor in load_file(file).items()}
                if file.is_file()
                else {}
            )
        plain: Any = OmegaConf.to_container(OmegaConf.load(beside / EXPORT_CONFIG))
        origin = read_origin(folder)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{beside} cannot be read ({first_line(error)}); run `vlmcap export` again") from error
    check_plugins(origin.get("plugins", {}))
    plain["llm" if plain["model"]["kind"] == "assembled" else "model"] |= {
        "checkpoint": str(folder.resolve()),
        "revision": None,
    }
    bases = {part: base for part, base in origin["bases"].items() if part == "encoder"}  # the other one is this folder
    return {"state_dict": weights, "vlmcap": {"config": plain, "bases": bases}}


# --- what a checkpoint has to fit -------------------------------------------------------------------------------------


def load_weights(assembly: Assembly, content: Mapping[str, Any], config: Config) -> None:
    """Puts a checkpoint's trained weights into a model of the same configuration.

    Raises:
        UserError: The model is of another architecture or stands on another base.
    """
    from vlmcap.training.sharding import load_whole_weights

    check_base_checkpoints(content["vlmcap"]["bases"], checkpoint_identity(config, assembly.sources)["bases"])
    check_weights(content["state_dict"], trained_parameters(assembly.captioner, StagePlan(config.tuning.stages)))
    weights = {name.removeprefix("captioner."): tensor for name, tensor in content["state_dict"].items()}
    load_whole_weights(assembly.captioner, weights)


def trained_parameters(captioner: VideoCaptioner, plan: StagePlan) -> dict[str, dict[str, nn.Parameter]]:
    """Part to the parameters that some stage trains, by their names in `captioner`."""
    parts: dict[str, dict[str, nn.Parameter]] = {part: {} for part in plan.trained_parts()}
    named = dict(captioner.named_parameters())
    has_encoder_adapters = any(name.startswith("encoder.") and "lora_" in name for name in named)
    for name, parameter in named.items():
        is_adapter = "lora_" in name
        if name.startswith("encoder."):
            part = "encoder" if is_adapter == has_encoder_adapters else ""
        elif name.startswith("projector."):
            part = "projector"
        else:
            part = "adapter" if is_adapter else "llm"
        if part in parts:
            parts[part][name] = parameter
    for part, parameters in parts.items():
        if not parameters:
            raise UserError(
                f"tuning gives the {part} a learning rate, but the model has no such part; choose another tuning=NAME"
            )
    return parts


def check_base_checkpoints(saved: Mapping[str, Mapping[str, str]], present: Mapping[str, Mapping[str, str]]) -> None:
    """`UserError` if a frozen base differs in content from the one that the checkpoint was trained on."""
    for part, base in saved.items():
        now = present.get(part)
        if now is not None and now["sha256"] != base["sha256"]:
            raise UserError(
                f"the checkpoint was trained on the {part} {base['name']} (sha256 {base['sha256'][:12]}), "
                f"but {part}.checkpoint is {now['name']} (sha256 {now['sha256'][:12]}); set {part}.checkpoint to the "
                "former"
            )


def check_weights(saved: Mapping[str, Tensor], trained: Mapping[str, Mapping[str, nn.Parameter]]) -> None:
    """`UserError` unless names and shapes of the saved weights are those of the trained parameters."""
    shapes = {f"captioner.{name}": tuple(p.shape) for parameters in trained.values() for name, p in parameters.items()}
    for name in sorted(shapes.keys() ^ saved.keys()):
        where = "the model lacks" if name in saved else "the checkpoint lacks"
        raise UserError(
            f"the checkpoint is from another architecture: {where} {name}; use the encoder, projector, llm and tuning "
            "of its run"
        )
    for name, shape in shapes.items():
        if tuple(saved[name].shape) != shape:
            raise UserError(
                f"the checkpoint is from another architecture: {name} is {tuple(saved[name].shape)} there and {shape} "
                "here; "
                "use the encoder, projector, llm and tuning of its run"
            )
