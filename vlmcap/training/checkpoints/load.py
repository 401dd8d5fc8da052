"""Reads checkpoints safely, checks them against a model, and loads captioners from them, all without Lightning."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmcap.assembly.base_checkpoints import BaseCheckpoints
from vlmcap.assembly.components import device_of
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

# An exported folder has a subfolder for everything that the model's class in transformers does not know. It cannot be
# beside config.json, because vLLM reads every `*.safetensors` there as weights of the model.
EXPORT_FOLDER, EXPORT_CONFIG, EXPORT_ORIGIN = "vlmcap", "config.yaml", "origin.json"
EXPORT_COMPONENTS = ("projector", "encoder")  # one file each; the second only if the encoder was trained


def load_captioner(checkpoint: str | Path, overrides: Mapping[str, Any] | None = None) -> VideoCaptioner:
    """Loads a captioner from a checkpoint, ready for `caption(paths)`.

    Args:
        checkpoint: File that train.py wrote, or folder that `vlmcap export` wrote.
        overrides: Values that replace those of the checkpoint's configuration, by dotted key, such as
            {"llm.max_new_tokens": 200}.

    Raises:
        UserError: The checkpoint or one of its base checkpoints is missing or has changed.
    """
    silence_libraries()
    content = read_checkpoint(checkpoint)
    config = single_process(saved_config(content["vlmcap"]["config"], overrides))
    if config.evaluation.engine is Engine.vllm:
        raise UserError("evaluation.engine=vllm works in evaluate.py only; leave it out here")
    assembly = assemble(describe_model(with_caption_plan(config)), is_fresh=False)
    load_weights(assembly, content, config)
    return assembly.captioner.to(device_of(config)).eval()


def single_process(config: Config) -> Config:
    """Returns the configuration for a single process, in which evaluation, captioning and export run."""
    hardware = dataclasses.replace(config.hardware, devices=1)
    trainer = dataclasses.replace(config.trainer)
    trainer.strategy, trainer.num_nodes = Strategy.auto, 1
    return dataclasses.replace(config, hardware=hardware, trainer=trainer)


# --- content of a checkpoint ------------------------------------------------------------------------------------------


def checkpoint_identity(config: Config, base_checkpoints: BaseCheckpoints) -> dict[str, Any]:
    """Returns what every checkpoint holds about its run: configuration, base checkpoints and plugins."""
    fingerprints = {component: base.as_dict() for component, base in base_checkpoints.fingerprints.items()}
    return {"config": to_plain(config), "base_checkpoints": fingerprints, "plugins": plugins_of(config)}


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Reads plain data and tensors of a checkpoint or of a folder of `vlmcap export`; pickled code is refused.

    Raises:
        UserError: The file does not exist, is not a checkpoint of vlmcap, or needs a plugin that is not loaded.
    """
    import pickle

    import torch

    file = Path(path)
    if is_export(file):
        return read_export(file)
    if not file.is_file():
        folder = file if file.is_dir() else file.parent
        # A run folder was given instead of its checkpoint: name the files in it.
        there = sorted(str(path) for path in {*folder.glob("*.ckpt"), *folder.glob("checkpoints/*.ckpt")})
        hint = f"there is {', '.join(there)}" if there else "give a .ckpt file under the checkpoints/ folder of a run"
        raise UserError(f"checkpoint {file} {'is a folder' if file.is_dir() else 'does not exist'}; {hint}")
    try:
        # Unpickles only tensors and plain data.
        content: Any = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise UserError(f"{file} is not a checkpoint that can be read safely: {first_line(error)}") from error
    if not isinstance(content, dict) or "vlmcap" not in content:
        raise UserError(
            f"{file} was not written by vlmcap's train.py; give a .ckpt file under the checkpoints/ folder of a run"
        )
    check_plugins(content["vlmcap"].get("plugins", {}))
    return content


def is_export(path: Path) -> bool:
    """Returns whether `vlmcap export` wrote the folder."""
    return (path / EXPORT_FOLDER / EXPORT_CONFIG).is_file()


def read_origin(folder: Path) -> dict[str, Any]:
    """Reads the origin of an export: the checkpoint, its base checkpoints and plugins."""
    origin: dict[str, Any] = json.loads((folder / EXPORT_FOLDER / EXPORT_ORIGIN).read_text(encoding="utf-8"))
    return origin


def read_export(folder: Path) -> dict[str, Any]:
    """Reads an exported folder in the form of a checkpoint: plain data, and the tensors outside of the base model.

    Raises:
        UserError: A file cannot be read.
    """
    from omegaconf import OmegaConf
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    beside = folder / EXPORT_FOLDER
    weights: dict[str, Tensor] = {}
    try:
        for component in EXPORT_COMPONENTS:
            file = beside / f"{component}.safetensors"
            weights |= (
                {f"captioner.{component}.{name}": tensor for name, tensor in load_file(file).items()}
                if file.is_file()
                else {}
            )
        plain: Any = OmegaConf.to_container(OmegaConf.load(beside / EXPORT_CONFIG))
        origin = read_origin(folder)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{beside} cannot be read ({first_line(error)}); run `vlmcap export` again") from error
    check_plugins(origin.get("plugins", {}))
    # The base checkpoint of the merged component is this folder, wherever it is now.
    plain["llm" if plain["model"]["kind"] == "assembled" else "model"] |= {
        "checkpoint": str(folder.resolve()),
        "revision": None,
    }
    # The other base checkpoint is this folder itself.
    encoder = {component: base for component, base in origin["base_checkpoints"].items() if component == "encoder"}
    return {"state_dict": weights, "vlmcap": {"config": plain, "base_checkpoints": encoder}}


# --- checks of a checkpoint against a model ---------------------------------------------------------------------------


def load_weights(assembly: Assembly, content: Mapping[str, Any], config: Config) -> None:
    """Loads the trained weights of a checkpoint into a model of the same configuration.

    Raises:
        UserError: The model has another architecture or other base checkpoints.
    """
    from vlmcap.training.sharding import load_full_weights

    check_base_checkpoints(
        content["vlmcap"]["base_checkpoints"],
        checkpoint_identity(config, assembly.base_checkpoints)["base_checkpoints"],
    )
    check_weights(content["state_dict"], trained_parameters(assembly.captioner, StagePlan(config.tuning.stages)))
    weights = {name.removeprefix("captioner."): tensor for name, tensor in content["state_dict"].items()}
    # Names without "captioner." are those of the captioner; the Lightning module adds the prefix.
    load_full_weights(assembly.captioner, weights)


def trained_parameters(captioner: VideoCaptioner, plan: StagePlan) -> dict[str, dict[str, nn.Parameter]]:
    """Returns, for each component, the parameters that some stage trains, by their names in `captioner`."""
    components: dict[str, dict[str, nn.Parameter]] = {component: {} for component in plan.trained_components()}
    named = dict(captioner.named_parameters())
    has_encoder_adapters = any(name.startswith("encoder.") and "lora_" in name for name in named)
    for name, parameter in named.items():
        is_adapter = "lora_" in name
        # An encoder with adapters trains only these, and its frozen weights belong to no component.
        # The encoder comes first, because an adapter of the encoder is no adapter of the language model.
        if name.startswith("encoder."):
            component = "encoder" if is_adapter == has_encoder_adapters else ""
        elif name.startswith("projector."):
            component = "projector"
        else:
            component = "adapter" if is_adapter else "llm"
        if component in components:
            components[component][name] = parameter
    for component, parameters in components.items():
        if not parameters:
            raise UserError(
                f"tuning gives the {component} a learning rate, but the model has no such component; choose another "
                "tuning=NAME"
            )
    return components


def check_base_checkpoints(saved: Mapping[str, Mapping[str, str]], present: Mapping[str, Mapping[str, str]]) -> None:
    """Raises a `UserError` if a base checkpoint differs from the one that the checkpoint was trained on."""
    for component, base in saved.items():
        now = present.get(component)
        # Only components that both sides name are compared.
        if now is not None and now["sha256"] != base["sha256"]:
            raise UserError(
                f"the checkpoint was trained on the {component} {base['name']} (sha256 {base['sha256'][:12]}), "
                f"but {component}.checkpoint is {now['name']} (sha256 {now['sha256'][:12]}); set "
                f"{component}.checkpoint to the former"
            )


def check_weights(saved: Mapping[str, Tensor], trained: Mapping[str, Mapping[str, nn.Parameter]]) -> None:
    """Raises a `UserError` unless the saved weights have the names and shapes of the trained parameters."""
    shapes = {f"captioner.{name}": tuple(p.shape) for parameters in trained.values() for name, p in parameters.items()}
    # Names in only one of the two; the first one is enough for the message.
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
                "here; use the encoder, projector, llm and tuning of its run"
            )
